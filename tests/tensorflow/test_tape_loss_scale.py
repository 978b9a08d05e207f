"""A tape under a ``LossScaleOptimizer`` that is built in the trace: the scale stays a variable."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow as hvd  # noqa: E402
from tests.tensorflow import training  # noqa: E402

CASES = {
    "plain": lambda model: {},
    "topk": lambda model: {"compression": hvd.Compression.topk(0.3, min_size=0)},
    "powersgd": lambda model: {"compression": hvd.Compression.powersgd(2)},
    "delay": lambda model: {"op": hvd.DelayCompensated(lam=1.0)},
    "seng": lambda model: {"preconditioner": hvd.SENG(model, damping=0.5, update_freq=2)},
}
SCALE = 2.0**20  # overflows in float16 some times
# Counts, and what says that the step's gradients are not used.
COUNTS = ("skipped_steps", "unusable_steps", "step_counter", "dynamic_scale", "reduced_at")


def half_model():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        return training.dense_model()
    finally:
        keras.config.set_dtype_policy("float32")


def overflowing_run(case, built, compiled):
    """Weights after steps that begin with overflows, the scale, and what an overflow has changed."""
    model = half_model()
    weights = model.trainable_variables
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05, momentum=0.9),
                                                    initial_scale=SCALE)
    options = CASES[case](model)
    if built:
        optimizer.build(weights)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.cast(model(x), tf.float32) - y) ** 2)
            scaled = optimizer.scale_loss(loss)
        tape = hvd.DistributedGradientTape(tape, optimizer=optimizer, **options)
        optimizer.apply(tape.gradient(scaled, weights), weights)

    run, changed = tf.function(step) if compiled else step, set()
    x, y = training.data()
    for number in range(10):
        before = {} if not number else {one.path: np.array(one) for one in optimizer.variables}
        scale = optimizer.built and float(optimizer.dynamic_scale)
        rows = slice(8 * (number % 6), 8 * (number % 6) + 8)
        run(tf.constant(x[rows][hvd.rank()::2]), tf.constant(y[rows][hvd.rank()::2]))
        if number and float(optimizer.dynamic_scale) < scale:
            changed |= {one.path.rpartition("/")[2] for one in optimizer.variables
                        if not np.array_equal(before[one.path], np.array(one))}
    return training.weights(model), float(optimizer.dynamic_scale), int(optimizer.iterations), changed


def overflowing_runs(case):
    return {(built, compiled): overflowing_run(case, built, compiled)
            for built, compiled in ((True, True), (False, True), (False, False))}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_the_scale_backs_off_and_training_goes_on(ranks, case):
    by_rank = ranks(2, init="tensorflow").run(overflowing_runs, case, timeout=120)
    reference = by_rank[0][True, True]
    for found in by_rank:
        for way, (weights, scale, iterations, changed) in found.items():
            assert scale == reference[1] < SCALE / 4, way
            assert 0 < iterations == reference[2] < 10, way
            assert all(name.startswith(COUNTS) for name in changed), (way, changed)
            for mine, other, same in zip(weights, reference[0], by_rank[0][way][0], strict=True):
                np.testing.assert_array_equal(mine, same)
                np.testing.assert_allclose(mine, other, rtol=2e-3, atol=1e-4)
        for mine, other in zip(found[False, True][0], found[True, True][0], strict=True):
            np.testing.assert_array_equal(mine, other)  # built in the trace or before: the same graph


def scaled_in_an_inner_function():
    """The first weight's gradient at two scales, from a function that another one calls."""
    model = training.dense_model()
    weights = model.trainable_variables
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), initial_scale=8.0)

    @tf.function
    def outer(x, y):
        return step(x, y)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
            scaled = optimizer.scale_loss(loss)
        tape = hvd.DistributedGradientTape(tape, optimizer=optimizer, compression=hvd.Compression.topk(1.0))
        gradients = tape.gradient(scaled, weights)
        optimizer.apply(gradients, weights)
        return gradients[0]

    x, y = (tf.constant(one[hvd.rank()::2][:4]) for one in training.data())
    outer(x, y)
    optimizer.dynamic_scale.assign(16.0)
    kept = [tf.identity(weight) for weight in weights]
    first = outer(x, y)
    for weight, value in zip(weights, kept, strict=True):
        weight.assign(value)
    optimizer.dynamic_scale.assign(32.0)
    return first.numpy(), outer(x, y).numpy()


@pytest.mark.distributed
def test_a_function_in_a_function_reads_the_scale(ranks):
    for first, second in ranks(2, init="tensorflow").run(scaled_in_an_inner_function):
        assert np.abs(first).max() > 0
        np.testing.assert_array_equal(second, 2 * first)

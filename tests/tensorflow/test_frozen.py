"""Layers frozen in the middle of training: they stay as they are, and what is kept of them waits."""

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
    "sharded": lambda model: {"server": "sharded"},
    "topk1": lambda model: {"compression": hvd.Compression.topk(1.0, min_size=0)},
    "topk": lambda model: {"compression": hvd.Compression.topk(0.3, min_size=0)},
    "powersgd": lambda model: {"compression": hvd.Compression.powersgd(1)},
    "delay": lambda model: {"op": hvd.DelayCompensated(lam=1.0)},
    "late": lambda model: {"overlap": hvd.DelayedUpdate()},
    "reply": lambda model: {"server": hvd.Server("sharded", downlink=hvd.Compression.topk(0.3, min_size=0))},
    "seng": lambda model: {"preconditioner": hvd.SENG(model, damping=0.5, update_freq=2)},
}
LIKE_ONE_PROCESS = ("plain", "sharded", "topk1")
TAPES = ("plain", "topk", "powersgd", "delay")


def rows(step, rank, size):
    x, y = training.data()
    mine = slice(8 * step, 8 * step + 8)
    return tf.constant(x[mine][rank::size]), tf.constant(y[mine][rank::size])


def train(model, optimizer, rank, size, *, tape=None, compiled=False, seen=None):
    """Six steps, the first layer frozen for the third and fourth."""
    def step(x, y):
        weights = model.trainable_variables
        with tf.GradientTape() as found:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        found = found if tape is None else hvd.DistributedGradientTape(found, optimizer=optimizer, **tape)
        optimizer.apply_gradients(zip(found.gradient(loss, weights), weights, strict=True))

    for number in range(6):
        if number in (0, 2, 4):
            model.layers[0].trainable = number != 2
            run = tf.function(step) if compiled else step
        still = kept(model, optimizer) if number == 2 else {}
        run(*rows(number, rank, size))
        if number == 2 and seen is not None:
            now = kept(model, optimizer)
            seen += [name for name in still if not np.array_equal(still[name], now[name], equal_nan=True)]
    return training.weights(model)


def kept(model, optimizer):
    """What belongs to the first layer: weights, moments; of all buckets what is kept of its places."""
    own = {one.path: np.array(one) for one in model.layers[0].weights}
    sizes = [int(np.prod(one.shape)) for one in model.layers[0].weights]
    for one in optimizer.variables:
        name, value = one.path.rpartition("/")[2], np.array(one)
        if any(name.startswith(f"{weight.path.replace('/', '_')}_momentum") for weight in
               model.layers[0].weights):
            own[one.path] = value
        if name == "residual_0":  # buckets begin with the last layer; PowerSGD's have no biases
            own[one.path] = value[-(sum(sizes) if value.size == 75 else max(sizes)):]
        if name == "q_0":
            own[one.path] = value[-model.layers[0].kernel.shape[0]:]
        if name == "mean_square_0":  # rank 0 has the first half of the bucket
            own[one.path] = value[75 - sum(sizes):] if hvd.rank() == 0 else value
    return own


def frozen_on_ranks(case, compiled):
    model, seen = training.dense_model(), []
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.01),
                                         **CASES[case](model))
    return train(model, optimizer, hvd.rank(), 2, compiled=compiled, seen=seen), seen


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_a_frozen_layer_stays_as_it_is(ranks, case):
    compiled = case in ("plain", "topk", "delay", "late")
    (weights, seen), (others, _) = ranks(2, init="tensorflow").run(frozen_on_ranks, case, compiled)
    assert not seen
    for mine, other in zip(weights, others, strict=True):
        np.testing.assert_array_equal(mine, other)
        assert np.isfinite(mine).all()
    if case in LIKE_ONE_PROCESS:
        plain = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.01)
        for mine, one in zip(weights, train(training.dense_model(), plain, 0, 1), strict=True):
            np.testing.assert_allclose(mine, one, rtol=1e-4, atol=1e-5)


def frozen_with_tapes():
    found = {}
    for case in TAPES:
        model, seen = training.dense_model(), []
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.01)
        found[case] = train(model, optimizer, hvd.rank(), 2, tape=CASES[case](model), compiled=True,
                            seen=seen), seen
    return found


@pytest.mark.distributed
def test_a_tape_takes_fewer_variables(ranks):
    first, second = ranks(2, init="tensorflow").run(frozen_with_tapes)
    for case, (weights, seen) in first.items():
        assert not seen, case
        for mine, other in zip(weights, second[case][0], strict=True):
            np.testing.assert_array_equal(mine, other)


def frozen_on_one_rank(case):
    model = training.dense_model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), **CASES[case](model))
    try:
        for number in range(4):
            model.layers[0].trainable = number < 2 or hvd.rank() == 0
            with tf.GradientTape() as tape:
                x, y = rows(number, hvd.rank(), 2)
                loss = tf.reduce_mean((model(x) - y) ** 2)
            weights = model.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
    except tf.errors.InvalidArgumentError as error:
        return number, str(error)
    return number, ""


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["plain", "sharded", "topk", "delay", "late"])
def test_ranks_that_freeze_differently_all_get_an_error(ranks, case):
    for number, message in ranks(2, init="tensorflow").run(frozen_on_one_rank, case):
        assert number == 2
        assert "the ranks do not train the same variables" in message


@pytest.mark.distributed
def test_frozen_with_fit(ranks):
    for case in ("plain", "topk"):
        for moved, equal in ranks(2, init="tensorflow").run(fitted, case):
            assert moved == [False, False, True, True]
            assert equal


def fitted(case):
    model = training.dense_model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), **CASES[case](model))
    training.fit(model, optimizer, hvd.rank(), 2, epochs=1)
    before = training.weights(model)
    model.layers[0].trainable = False
    training.fit(model, optimizer, hvd.rank(), 2, epochs=1)
    hvd.assert_replicas_equal(model)
    return [not np.array_equal(*pair) for pair in zip(before, training.weights(model), strict=True)], True

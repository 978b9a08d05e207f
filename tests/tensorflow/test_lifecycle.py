"""What happens to a training in weeks: gradients missing on a rank, rates that differ, skipped steps."""

from __future__ import annotations

import functools
import gc

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from hvd_ext.tensorflow.byte_counts import StepByteCounter  # noqa: E402

pytestmark = pytest.mark.distributed
SHAPES = [(6, 5), (7,)]


def variables():
    rng = np.random.default_rng(0)
    return [tf.Variable(rng.normal(size=shape).astype("float32"), name=f"p{number}")
            for number, shape in enumerate(SHAPES)]


def gradients(step):
    rng = np.random.default_rng([hvd.rank(), step])
    return [tf.constant(rng.normal(size=shape).astype("float32")) for shape in SHAPES]


def method(name):
    return {"delay": {"op": hvd.DelayCompensated()},
            "topk": {"compression": hvd.Compression.topk(0.3, min_size=0)},
            "powersgd": {"compression": hvd.Compression.powersgd()}}[name]


def missing_on_one_rank(name, compiled):
    """A gradient that one rank does not have counts as zeros; nothing of the residual is lost."""
    results = []
    for explicit in (False, True):
        ours = variables()
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), **method(name))

        def apply(given, ours=ours, optimizer=optimizer):
            optimizer.apply_gradients(list(zip(given, ours, strict=True)))

        for step in range(4):
            given = gradients(step)
            missing = {1: [hvd.rank()], 2: [1]}.get(step, [])  # another one on each rank, then on both
            given = [(tf.zeros_like(g) if explicit else None) if number in missing else g
                     for number, g in enumerate(given)]
            step_of = functools.partial(apply, given)
            (tf.function(step_of) if compiled else step_of)()
        results.append([one.numpy() for one in ours])
        hvd.assert_replicas_equal(ours)
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def rate_of_one_rank():
    ours = variables()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1 * (1 + hvd.rank())),
                                         op=hvd.DelayCompensated())
    with pytest.raises(tf.errors.InvalidArgumentError, match="learning rates differ"):
        optimizer.apply_gradients(list(zip(gradients(0), ours, strict=True)))


def other_settings():
    ours = variables()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1),
                                         op=hvd.DelayCompensated(lam=2.0 + hvd.rank()))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)lam=2\.0.*lam=3\.0"):
        optimizer.apply_gradients(list(zip(gradients(0), ours, strict=True)))


def one_optimizer_more():
    """A rank that has made more optimizers and layers than the other trains on with it."""
    for _ in range(hvd.rank()):
        hvd.DistributedOptimizer(keras.optimizers.Adam())
        keras.layers.Dense(3).build((None, 2))
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    for options in ({}, method("topk"), {"server": "sharded"}):
        model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(), **options), "mse")
        model.fit(np.ones((8, 4)), np.ones((8, 3)) * hvd.rank(), batch_size=4, verbose=0)
        hvd.assert_replicas_equal(model)


def seng_waits_with_topk():
    """A step that TopK skips is none for SENG either."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, activation="tanh"),
                              keras.layers.Dense(3)])
    seng = hvd.SENG(model, damping=0.5, update_freq=2)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), preconditioner=seng,
                                           compression=hvd.Compression.topk(0.5, min_size=0)), "mse")
    rng = np.random.default_rng(hvd.rank())
    for step in range(4):
        x = rng.normal(size=(8, 4)).astype("float32")
        if step == 2 and hvd.rank() == 1:
            x[0, 0] = np.nan
        model.train_on_batch(x, rng.normal(size=(8, 3)).astype("float32"))
    hvd.assert_replicas_equal(model)
    return int(seng.steps), model.optimizer.report()["skipped_steps"], bool(
        all(np.isfinite(w).all() for w in model.get_weights()))


class Scale(keras.layers.Layer):
    """A weight of a layer that nobody knows."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return x * self.w


def no_layer_with_a_rule():
    """A model that SENG has no rule for trains on with g / (1 + damping)."""
    results = []
    for preconditioned in (False, True):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), Scale()])
        options = {}
        if preconditioned:
            with pytest.warns(UserWarning, match="no rule"):
                options["preconditioner"] = hvd.SENG(model, damping=0.5)
        rate = 0.15 if preconditioned else 0.1
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(rate), **options), "mse")
        model.fit(np.arange(24.0).reshape(8, 3) / 24, np.ones((8, 3)) * hvd.rank(), batch_size=4,
                  shuffle=False, verbose=0)
        hvd.assert_replicas_equal(model)
        results.append(model.get_weights()[0])
    np.testing.assert_allclose(*results, rtol=1e-5)


class Experts(keras.Model):
    """Two experts; the second gets the rows whose first entry is above a threshold."""

    def __init__(self):
        super().__init__()
        self.first, self.second = keras.layers.Dense(3), keras.layers.Dense(3)

    def call(self, x):
        far = x[:, 0] > 100.0
        return tf.concat([self.first(tf.boolean_mask(x, ~far)), self.second(tf.boolean_mask(x, far))], 0)


def expert_without_tokens():
    """An expert that no row of a batch goes to leaves the step as good as any."""
    keras.utils.set_random_seed(0)
    model = Experts()
    model(np.where(np.arange(8)[:, None] < 3, 200.0, 1.0) * np.ones((8, 4), "float32"))
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), preconditioner=hvd.SENG(
        model, damping=0.5, update_freq=1)), "mse", jit_compile=False)
    rng = np.random.default_rng(hvd.rank())
    for step in range(3):
        x = rng.normal(size=(8, 4)).astype("float32")
        if step == 2:
            x[:3, 0] = 200.0
        model.train_on_batch(x, np.zeros((8, 3), "float32"))
    hvd.assert_replicas_equal(model)
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.parametrize("name", ["delay", "topk", "powersgd"])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_missing_on_one_rank(ranks, name, compiled):
    ranks(2, init="tensorflow").run(missing_on_one_rank, name, compiled)


@pytest.mark.parametrize("case", [rate_of_one_rank, other_settings, one_optimizer_more,
                                  no_layer_with_a_rule, expert_without_tokens])
def test_on_two_ranks(ranks, case):
    ranks(2, init="tensorflow").run(case)


def test_seng_does_not_go_on_in_a_step_that_is_skipped(ranks):
    assert ranks(2, init="tensorflow").run(seng_waits_with_topk) == [(3, 1, True)] * 2


def test_what_is_kept_for_a_traced_function_goes_with_it():
    traffic = StepByteCounter()

    def trace():
        @tf.function
        def step(x):
            traffic.begin_step()
            with traffic.count_section():
                traffic.count_message("gradients", 8, 8)
            return x

        step(tf.constant(1.0))

    for _ in range(20):
        trace()
        gc.collect()
    assert len(traffic._notes) < 5


def one_rank_traces_again(name):
    """TensorFlow runs what depends on constants alone while it prepares a graph, on that rank alone."""
    ours = [*variables(), tf.Variable(np.ones(5), name="unused", dtype="float64")]  # a bucket of its own
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), **method(name))
    traces = []

    @tf.function
    def step(x):
        traces.append(x.shape)
        with tf.GradientTape() as tape:
            loss = sum(tf.reduce_sum(one) * tf.reduce_mean(x) for one in ours[:2])
        optimizer.apply_gradients(list(zip(tape.gradient(loss, ours), ours, strict=True)))

    for number in range(4):
        rows = 3 + hvd.rank() * number  # the last batches are shorter on one rank
        step(tf.fill((rows, 2), float(1 + hvd.rank())))
    hvd.assert_replicas_equal(ours)
    return len(traces)


@pytest.mark.parametrize("name", ["delay", "topk", "powersgd"])
def test_a_rank_that_traces_its_step_again_holds_nobody_up(ranks, name):
    traced = ranks(2, init="tensorflow").run(one_rank_traces_again, name, timeout=60)
    assert traced[0] < traced[1]

"""bfloat16 and float16: Horovod's operations, broadcasts, reduction and servers, against float64."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow as hvd_tf  # noqa: E402
import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.tensorflow import training  # noqa: E402


def numbers(rank, shape=(6, 3)):
    return np.random.default_rng(rank).normal(size=shape)


def rounded(values, dtype):
    return tf.cast(tf.constant(values), dtype)


def operations(dtype):
    """Every operation on tensors of ``dtype``, in eager mode, with its gradient where it has one."""
    rank, size = hvd.rank(), hvd.size()
    mine = rounded(numbers(rank), dtype)
    exact = [np.array(rounded(numbers(one), dtype), dtype="float64") for one in range(size)]
    step = 2.0**-7 if dtype == "bfloat16" else 2.0**-10  # relative distance of neighbours

    def near(found, expected):
        assert found.dtype.name == dtype
        np.testing.assert_allclose(np.array(found, "float64"), expected, rtol=2 * step, atol=2 * step)

    near(hvd_tf.allreduce(mine, op=hvd_tf.Average), np.mean(exact, axis=0))
    near(hvd_tf.allreduce(mine, op=hvd_tf.Max), np.max(exact, axis=0))
    near(hvd_tf.allreduce(mine, op=hvd_tf.Sum, compression=hvd_tf.Compression.fp16), np.sum(exact, axis=0))
    near(hvd_tf.grouped_allreduce([mine, 2 * mine], op=hvd_tf.Sum)[1], 2 * np.sum(exact, axis=0))
    slices = hvd_tf.allreduce(tf.IndexedSlices(mine, tf.range(6), tf.constant([6, 3])), op=hvd_tf.Sum)
    near(tf.convert_to_tensor(slices), np.sum(exact, axis=0))
    near(hvd_tf.allreduce(tensor=mine, op=hvd_tf.Sum), np.sum(exact, axis=0))
    with pytest.raises(TypeError, match="tensor"):
        hvd_tf.allreduce(op=hvd_tf.Sum)
    received, splits = hvd_tf.alltoall(mine, splits=tf.constant([3, 3]))
    near(received, np.concatenate([one[3 * rank:3 * rank + 3] for one in exact]))
    assert splits.numpy().tolist() == [3, 3]
    near(hvd_tf.reducescatter(mine, op=hvd_tf.Sum), np.sum(exact, axis=0)[3 * rank:3 * rank + 3])
    for found, expected in [(hvd_tf.allgather(mine), np.concatenate(exact)),
                            (hvd_tf.grouped_allgather([mine])[0], np.concatenate(exact)),
                            (hvd_tf.broadcast(mine, 1), exact[1]), (hvd.broadcast(mine, 1), exact[1]),
                            (hvd.allgather(mine), np.concatenate(exact))]:
        assert found.dtype.name == dtype
        np.testing.assert_array_equal(np.array(found, "float64"), expected)  # moved: not rounded
    with tf.GradientTape() as tape:
        tape.watch(mine)
        loss = tf.reduce_sum(hvd_tf.allgather(mine) * float(rank + 1))
    near(tape.gradient(loss, mine), np.full((6, 3), 1.5))  # Horovod's: the mean over the ranks


def variables_are_broadcast(dtype):
    own = numbers(hvd.rank())
    made = [keras.Variable(own, dtype=dtype), tf.Variable(rounded(own, dtype)),
            tf.Variable(float(hvd.rank()))]
    hvd.broadcast_variables(made, root_rank=1)
    expected = np.array(rounded(numbers(1), dtype), "float64")
    for one in made[:2]:
        np.testing.assert_array_equal(np.array(tf.convert_to_tensor(one), "float64"), expected)
    assert float(made[2]) == 1.0

    @tf.function
    def inside():
        hvd.broadcast_variables(made[1:], root_rank=0)

    made[1].assign(rounded(numbers(hvd.rank()), dtype))
    inside()
    np.testing.assert_array_equal(np.array(tf.convert_to_tensor(made[1]), "float64"),
                                  np.array(rounded(numbers(0), dtype), "float64"))


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_operations_and_broadcasts(ranks, dtype):
    ranks(2, init="tensorflow").run(operations, dtype)
    ranks(2, init="tensorflow").run(variables_are_broadcast, dtype)


def narrow_model(dtype):
    keras.utils.set_random_seed(7)
    return keras.Sequential([keras.Input((5,), dtype=dtype), keras.layers.Dense(8, dtype=dtype),
                             keras.layers.Dense(3, dtype=dtype)])


def fit_narrow(dtype, options):
    options = {name: value() if callable(value) else value for name, value in options.items()}
    model = narrow_model(dtype)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=0.5), **options)
    training.fit(model, optimizer, hvd.rank(), hvd.size(), epochs=1, callbacks=[
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.AssertReplicasEqualCallback(1)])
    assert all(weight.dtype == dtype for weight in model.weights)
    return [one.astype("float64") for one in training.weights(model)]


def joined_in_float64(dtype):
    """The same linear net by NumPy in float64 from the same rounded weights."""
    weights = [one.astype("float64") for one in training.weights(narrow_model(dtype))]
    x, y = (one.astype("float64") for one in training.data())
    momenta = [np.zeros_like(one) for one in weights]
    for step in range(training.STEPS):
        rows = slice(step * 2 * training.BATCH, (step + 1) * 2 * training.BATCH)
        w1, b1, w2, b2 = weights
        hidden = x[rows] @ w1 + b1
        out = 2 * (hidden @ w2 + b2 - y[rows]) / y[rows].size
        back = out @ w2.T
        gradients = [x[rows].T @ back, back.sum(0), hidden.T @ out, out.sum(0)]
        momenta = [0.5 * one - 0.05 * gradient for one, gradient in zip(momenta, gradients, strict=True)]
        weights = [one + change for one, change in zip(weights, momenta, strict=True)]
    return weights


PLAIN = {"plain": {}, "grouped": {"groups": 1}, "fp16": {"compression": hvd.Compression.fp16},
         "sharded": {"server": "sharded"}, "rank0": {"server": "rank0"}}


def fit_all(dtype, names):
    return {name: fit_narrow(dtype, PLAIN[name]) for name in names}


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_variables_of_narrow_types_train_and_stay_equal(ranks, dtype):
    reference = joined_in_float64(dtype)
    by_rank = ranks(2, init="tensorflow").run(fit_all, dtype, tuple(PLAIN), timeout=200)
    for name in PLAIN:
        for mine, other, expected in zip(by_rank[0][name], by_rank[1][name], reference, strict=True):
            np.testing.assert_array_equal(mine, other)
            # Six updates, each rounded to 8 (11) bits of numbers up to 2.
            np.testing.assert_allclose(mine, expected, atol=0.06 if dtype == "bfloat16" else 0.01)


def fit_mixed(name):
    options = {"plain": {}, "topk": {"compression": hvd.Compression.topk(0.5, min_size=1)},
               "delay": {"op": hvd.DelayCompensated(lam=0.5)}, "sharded": {"server": "sharded"}}[name]
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = training.dense_model()
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05), **options)
    training.fit(model, optimizer, hvd.rank(), hvd.size(), callbacks=[
        hvd.callbacks.AssertReplicasEqualCallback(1)])
    return training.weights(model)


def fit_mixed_all(names):
    return {name: fit_mixed(name) for name in names}


@pytest.mark.distributed
def test_mixed_bfloat16(ranks):
    names = ("plain", "topk", "delay", "sharded")
    by_rank = ranks(2, init="tensorflow").run(fit_mixed_all, names, timeout=200)
    one = training.weights(training.fit_joined(training.dense_model(), keras.optimizers.SGD(0.05), 2))
    for name in names:
        for mine, other, reference in zip(by_rank[0][name], by_rank[1][name], one, strict=True):
            assert mine.dtype == np.float32
            np.testing.assert_array_equal(mine, other)
            if name in ("plain", "sharded"):
                np.testing.assert_allclose(mine, reference, atol=0.02)

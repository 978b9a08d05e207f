"""Layers whose gradients stay on their rank, with each extension."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.keras as hvd  # noqa: E402
import hvd_ext.tensorflow as hvd_tf  # noqa: E402
from tests.tensorflow import training  # noqa: E402

OPTIONS = {
    "plain": dict,
    "topk": lambda: {"compression": hvd.Compression.topk(1.0, min_size=1)},
    "delay": lambda: {"op": hvd.DelayCompensated(lam=0.0, adaptive=False)},
    "sharded": lambda: {"server": "sharded"},
    "rank0": lambda: {"server": "rank0"},
}


def gradients_by_hand(model, rank):
    x, y = training.data()
    x, y = x[rank::2][:training.BATCH], y[rank::2][:training.BATCH]
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - y) ** 2)
    return [one.numpy() for one in tape.gradient(loss, model.trainable_variables)]


def one_step(options, with_tape):
    """Weights after a step whose last layer is local, and what they should be."""
    model = training.dense_model()
    both = [gradients_by_hand(model, rank) for rank in range(2)]
    mean = [sum(pair) / 2 for pair in zip(*both, strict=True)]
    # A local gradient is its share of a mean: divided by the ranks (Horovod's scale_local_gradients).
    expected = [w - 0.1 * (g if number < 2 else own / 2) for number, (w, g, own) in
                enumerate(zip(training.weights(model), mean, both[hvd.rank()], strict=True))]
    rank = hvd.rank()
    x, y = training.data()
    x, y = x[rank::2][:training.BATCH], y[rank::2][:training.BATCH]
    if with_tape:
        optimizer = keras.optimizers.SGD(0.1)
        extra = {"optimizer": optimizer} if options else {}
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        tape = hvd_tf.PartialDistributedGradientTape(tape, local_layers=model.layers[-1], **options, **extra)
        optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_variables),
                                      model.trainable_variables, strict=True))
    else:
        optimizer = hvd.PartialDistributedOptimizer(keras.optimizers.SGD(0.1),
                                                    local_layers=[model.layers[-1]], **options)
        model.compile(optimizer, "mse")
        model.fit(x, y, batch_size=training.BATCH, shuffle=False, verbose=0, callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(
                0, local_variables=[one.value for one in model.layers[-1].trainable_variables])])
    for found, value in zip(training.weights(model), expected, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-5)
    hvd.assert_replicas_equal(model.layers[0])
    return training.weights(model)[2:]


def every_option(names, with_tape):
    return {name: one_step(OPTIONS[name](), with_tape) for name in names}


@pytest.mark.distributed
@pytest.mark.parametrize("with_tape", [False, True])
def test_local_layers_keep_their_own_gradients(ranks, with_tape):
    names = tuple(name for name in OPTIONS if not with_tape or name in ("plain", "topk", "delay"))
    first, second = ranks(2, init="tensorflow").run(every_option, names, with_tape, timeout=150)
    for name in names:
        assert not np.allclose(first[name][0], second[name][0])


def with_curvature():
    model = training.dense_model()
    optimizer = hvd.PartialDistributedOptimizer(
        keras.optimizers.SGD(0.05), local_layers=[model.layers[-1]],
        preconditioner=hvd.SENG(model, damping=0.5, update_freq=2))
    training.fit(model, optimizer, hvd.rank(), hvd.size())
    hvd.assert_replicas_equal(model.layers[0])
    return training.weights(model)


@pytest.mark.distributed
def test_local_layers_beside_seng(ranks):
    first, second = ranks(2, init="tensorflow").run(with_curvature, timeout=100)
    assert all(np.isfinite(one).all() for one in first)
    assert not np.allclose(first[2], second[2])


def test_bad_local_layers():
    with pytest.raises(ValueError, match="must be Keras layers"):
        hvd.PartialDistributedOptimizer(keras.optimizers.SGD(0.1), local_layers=["dense"])
    with pytest.raises(ValueError, match="have no weights yet"):
        hvd.PartialDistributedOptimizer(keras.optimizers.SGD(0.1), local_layers=keras.layers.Dense(2))

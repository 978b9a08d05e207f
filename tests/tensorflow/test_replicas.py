"""After ``model.fit`` all ranks hold the same bits, under every extension and under none."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow as horovod_tf  # noqa: E402
import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.tensorflow import training  # noqa: E402


def seng(coupling):
    return lambda model: {"preconditioner": hvd.SENG(model, damping=0.5, update_freq=2,
                                                     coupling=coupling)}


CASES = {
    "none": lambda model: {},
    "delay": lambda model: {"op": hvd.DelayCompensated()},
    "topk": lambda model: {"compression": hvd.Compression.topk(0.3, min_size=0)},
    "rank0": lambda model: {"server": "rank0"},
    "sharded": lambda model: {"server": "sharded"},
    **{coupling: seng(coupling) for coupling in ("block", "lagged", "full")},
}


def fitted(names, eagerly):
    """Weights by case; each rank starts from weights of its own, and the broadcast makes them one."""
    found = {}
    for name in names:
        model = training.dense_model()
        for weight in model.weights:
            weight.assign(weight + 0.1 * hvd.rank())
        optimizer = hvd.DistributedOptimizer(hvd.AMSGrad(0.01), **CASES[name](model))
        training.fit(model, optimizer, hvd.rank(), hvd.size(), epochs=1, run_eagerly=eagerly,
                     callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
        hvd.assert_replicas_equal(model, optimizer=optimizer)
        assert int(optimizer.iterations) == training.STEPS
        found[name] = training.weights(model)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "names", "eagerly"), [
    (2, tuple(CASES), False), (2, ("topk", "delay", "lagged", "sharded"), True),
    pytest.param(4, tuple(CASES), False, marks=pytest.mark.extended),
])
def test_replicas_are_the_same_bits_after_fit(ranks, size, names, eagerly):
    by_rank = ranks(size, init="tensorflow").run(fitted, names, eagerly, timeout=250)
    start = training.weights(training.dense_model())
    for name in names:
        for rank in by_rank:
            for mine, first in zip(rank[name], by_rank[0][name], strict=True):
                np.testing.assert_array_equal(mine, first)
                assert np.isfinite(mine).all()
        assert not np.array_equal(by_rank[0][name][0], start[0])
    if "none" in names:
        one = training.fit_joined(training.dense_model(), hvd.AMSGrad(0.01), size, epochs=1)
        for name in ("none", "rank0", "sharded"):
            for mine, reference in zip(by_rank[0][name], training.weights(one), strict=True):
                np.testing.assert_allclose(mine, reference, rtol=1e-5, atol=1e-5)
    assert len({rank[name][0].tobytes() for rank in by_rank for name in names}) >= 3


def test_bad_input():
    assert keras.backend.backend() == "tensorflow"
    model = training.dense_model()
    for optimizer in (hvd.AMSGrad(0.01), keras.optimizers.SGD(0.1)):
        wrapped = hvd.DistributedOptimizer(optimizer, preconditioner=None)
        with pytest.raises(ValueError, match=r"call hvd\.DistributedOptimizer once"):
            hvd.DistributedOptimizer(wrapped, server="sharded")
    hvd.SENG(keras.Sequential([keras.layers.Dense(2)]), damping=0.1).close()  # waits for the first batch
    with pytest.raises(ValueError, match="no weights yet; call it on a batch"):
        hvd.assert_replicas_equal(keras.Sequential([keras.layers.Dense(2)]))
    embedding = keras.Sequential([keras.Input((3,)), keras.layers.Embedding(4, 2)])
    embedding.trainable = False
    with pytest.raises(ValueError, match="no trainable layer that SENG has a rule for"):
        hvd.SENG(embedding, damping=0.1)
    with pytest.raises(TypeError, match="preconditioner must be"):
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), preconditioner=model)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_another_backend_is_refused_with_the_way_out(monkeypatch, backend):
    model = training.dense_model()
    monkeypatch.setattr(keras.backend, "backend", lambda: backend)
    for use in (lambda: hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)),
                lambda: hvd.SENG(model, damping=0.1),
                lambda: hvd.load_model("nowhere.keras"),
                lambda: hvd.save_model(model, "nowhere.keras"),
                lambda: hvd.callbacks.BroadcastGlobalVariablesCallback(0)):
        with pytest.raises(RuntimeError, match=f"runs on '{backend}': set KERAS_BACKEND=tensorflow"):
            use()


def broadcast_under_other_names(inplace, in_graph):
    for _ in range(hvd.rank()):  # Keras numbers layers by how many this process has made
        keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)  # variables named after the layers'
    for number, weight in enumerate(model.weights):
        weight.assign(weight * 0 + 10 * number + hvd.rank())

    def broadcast():
        horovod_tf.broadcast_variables(model.weights[:2], root_rank=1, inplace=inplace)
        horovod_tf.broadcast_variables(model.weights[2:], root_rank=1, inplace=inplace)
        horovod_tf.broadcast_variables(optimizer.variables, root_rank=1, inplace=inplace)

    (tf.function(broadcast) if in_graph else broadcast)()
    for number, weight in enumerate(model.weights):
        np.testing.assert_array_equal(weight, np.full(weight.shape, 10 * number + 1, "float32"))
    return [layer.name for layer in model.layers]


@pytest.mark.distributed
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_variables_are_broadcast_whatever_their_names(ranks, inplace, in_graph):
    names = ranks(2, init="tensorflow").run(broadcast_under_other_names, inplace, in_graph)
    assert names[0] != names[1]


def broadcast_of_other_variables(how):
    variables = {"number": [tf.Variable(1.0)] * (1 + hvd.rank()),
                 "shape": [tf.Variable(tf.zeros(2 + hvd.rank()))],
                 "order": [tf.Variable(tf.zeros(3), name=name)
                           for name in ("kernel", "momentum")[:: 1 - 2 * hvd.rank()]]}[how]
    with pytest.raises(ValueError, match=r"do not broadcast the same variables.*rank 1 .* variable"):
        horovod_tf.broadcast_variables(variables, root_rank=0)


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["number", "shape", "order"])
def test_a_broadcast_of_other_variables_is_an_error_on_every_rank(ranks, how):
    ranks(2, init="tensorflow").run(broadcast_of_other_variables, how)

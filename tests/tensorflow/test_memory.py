"""A model and its optimizer leave nothing in memory: no object, no traced graph, no registered gradient."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402
from tensorflow.python.framework import ops  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402

METHODS = {
    "plain": lambda model: {},
    "SENG": lambda model: {"preconditioner": hvd.SENG(model, damping=0.1)},
    "delay": lambda model: {"op": hvd.DelayCompensated()},
    "topk": lambda model: {"compression": hvd.Compression.topk(0.3, min_size=0)},
    "delayed update": lambda model: {"overlap": hvd.DelayedUpdate()},
    "sharded": lambda model: {"server": "sharded"},
}
WARM, FITS = 1, 1  # the first leaves kernels, which later ones use


def fit(name):
    """Train a model; weak references to it and its optimizer."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8, activation="tanh"),
                              hvd.SyncBatchNormalization(), keras.layers.Dense(3)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), **METHODS[name](model))
    model.compile(optimizer, "mse")
    model.fit(np.ones((8, 5)), np.ones((8, 3)), batch_size=4, verbose=0)
    return weakref.ref(model), weakref.ref(optimizer)


def left_behind(name):
    """How many models and optimizers are still there after some fits; how many graphs and gradients came."""
    gone, graphs, gradients = [], [], []
    for number in range(WARM + FITS):
        gone += fit(name)
        keras.backend.clear_session()
        gc.collect()
        if number + 1 in (WARM, WARM + FITS):
            graphs.append(sum(type(one).__name__ == "FuncGraph" for one in gc.get_objects()))
            gradients.append(len(ops.gradient_registry.list()))
    return sum(one() is not None for one in gone), graphs[1] - graphs[0], gradients[1] - gradients[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_leaves_nothing_in_memory(ranks, name):
    assert ranks(2, init="tensorflow").run(left_behind, name, timeout=200) == [(0, 0, 0)] * 2


def differentiate_functions():
    """A layer with a gradient of its own within a function, whose gradient is taken from its graph."""
    layer = hvd.SyncBatchNormalization(epsilon=0.0, dtype="float64")
    layer.build((None, 2))
    inner = tf.function(lambda x: tf.reduce_sum(layer(x, training=True) ** 3))
    x = tf.constant(np.random.default_rng(hvd.rank()).normal(size=(4, 2)))
    found = []
    for run in (lambda: inner(x), tf.function(lambda: inner(x)),
                lambda: tf.reduce_sum(layer(x, training=True) ** 3)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = run()
        found.append(tape.gradient(loss, x).numpy())
    return found


def test_gradients_within_functions_are_found(ranks):
    for first, second, eager in ranks(2, init="tensorflow").run(differentiate_functions):
        np.testing.assert_allclose(first, eager, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(second, eager, rtol=1e-12, atol=1e-13)

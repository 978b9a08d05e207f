"""A model and its optimizer leave no more in memory than what Keras itself leaves of them."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402

METHODS = {
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
                              keras.layers.Dense(3)])
    optimizer = keras.optimizers.SGD(0.1)
    if name is not None:
        optimizer = hvd.DistributedOptimizer(optimizer, **METHODS[name](model))
    model.compile(optimizer, "mse")
    model.fit(np.ones((8, 5)), np.ones((8, 3)), batch_size=4, verbose=0)
    return weakref.ref(model), weakref.ref(optimizer)


def left_behind(name):
    """How many models and optimizers are still there after some fits, and how many graphs have come."""
    gone, graphs = [], []
    for number in range(WARM + FITS):
        gone += fit(name)
        keras.backend.clear_session()
        gc.collect()
        if number + 1 in (WARM, WARM + FITS):
            graphs.append(sum(type(one).__name__ == "FuncGraph" for one in gc.get_objects()))
    return sum(one() is not None for one in gone), graphs[1] - graphs[0]


def left_behind_by_all(names):
    return {name: left_behind(name) for name in names}


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_leaves_nothing_in_memory(ranks, name):
    for found in ranks(2, init="tensorflow").run(left_behind_by_all, [None, name], timeout=200):
        _, by_keras = found[None]
        objects, graphs = found[name]
        assert objects == 0
        assert graphs <= by_keras

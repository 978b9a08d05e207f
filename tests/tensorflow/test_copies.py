"""Copies of a distributed optimizer, alone or with its model: distributed again, or refused."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras
import tensorflow as tf

import hvd_ext.tensorflow.keras as hvd
from hvd_ext.tensorflow.keras_hooks import distributed_part, wrapper_of
from tests.tensorflow import training

pytestmark = pytest.mark.distributed
WAYS = {
    "from_config": lambda model: type(model.optimizer).from_config(model.optimizer.get_config()),
    "pickle": lambda model: pickle.loads(pickle.dumps(model.optimizer)),
    "deepcopy": lambda model: copy.deepcopy(model.optimizer),
    "deepcopy of the model": lambda model: copy.deepcopy(model),
    "clone_model": lambda model: cloned(model),
    "pickle of the model": lambda model: pickle.loads(pickle.dumps(model)),
}


def cloned(model):
    again = keras.models.clone_model(model)
    again.set_weights(model.get_weights())
    return again


def compiled(**settings):
    model = training.dense_model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=0.9), **settings)
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    return model


def train(model, steps):
    for step in steps:
        rows = np.random.default_rng([hvd.rank(), step])
        model.train_on_batch(*(rows.normal(size=(8, n)).astype("float32") for n in (5, 3)))


def each_way():
    """By way: whether the copy is distributed, what it reduces with, and the weights after it went on."""
    model = compiled(compression=hvd.Compression.topk(0.3, min_size=0))
    train(model, [0])
    before, found = training.weights(model), {}
    for way, make in WAYS.items():
        made = make(model)
        again = made
        if not isinstance(made, keras.Model):
            again = training.dense_model()
            again.set_weights(before)
            again.compile(made, "mse")
        kinds = type(made) is type(model.optimizer) or isinstance(made, keras.Model)
        train(again, [2])
        hvd.assert_replicas_equal(again)
        found[way] = kinds, type(wrapper_of(again.optimizer).reducer).__name__, training.weights(again)
    train(model, [2])
    found["uninterrupted"] = True, "TopKReducer", training.weights(model)
    return found


def test_copies_reduce_gradients_and_go_on(ranks):
    for found in ranks(2, init="tensorflow").run(each_way, timeout=120):
        for way, (kinds, reducer, weights) in found.items():
            assert kinds, way
            assert reducer == "TopKReducer", way
            if way not in ("from_config", "clone_model"):  # which are without state, as in Keras
                for mine, straight in zip(weights, found["uninterrupted"][2], strict=True):
                    np.testing.assert_array_equal(mine, straight, err_msg=way)


def refused():
    """The messages for copies that cannot be made."""
    model, said = training.dense_model(), []
    seng = hvd.SENG(model, damping=0.5)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), preconditioner=seng), "mse")
    plain = dict(model.optimizer.get_config())
    for call in (lambda: copy.deepcopy(model), lambda: pickle.dumps(model.optimizer),
                 lambda: type(model.optimizer).from_config(model.optimizer.get_config()),
                 lambda: type(model.optimizer).from_config(plain)):
        with pytest.raises(ValueError, match=r"hvd\.DistributedOptimizer") as caught:
            call()
        said.append(str(caught.value))
    with pytest.warns(UserWarning, match="the copy of the model is not compiled: .* preconditioner="):
        assert not keras.models.clone_model(model).compiled
    return said


def test_what_cannot_be_copied_is_an_error(ranks):
    for said in ranks(2, init="tensorflow").run(refused):
        assert all("preconditioner=" in one and "keras.models.clone_model" in one for one in said[:3])
        assert "hvd.DistributedOptimizer(keras.optimizers.SGD.from_config(config))" in said[3]


def untouched():
    """Plain optimizers and models are copied as before; a LossScaleOptimizer's inner one is distributed."""
    plain = training.dense_model()
    plain.compile(keras.optimizers.SGD(0.1), "mse")
    mixed = training.dense_model()
    mixed.compile(keras.optimizers.LossScaleOptimizer(
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))), "mse")
    again = copy.deepcopy(mixed).optimizer
    return (type(copy.deepcopy(plain).optimizer) is keras.optimizers.SGD,
            wrapper_of(copy.deepcopy(plain).optimizer) is None,
            isinstance(again, keras.optimizers.LossScaleOptimizer) and distributed_part(again) is not again,
            bool(tf.reduce_all(plain.layers[0].kernel == copy.deepcopy(plain).layers[0].kernel)))


def test_plain_copies_and_loss_scales(ranks):
    assert ranks(2, init="tensorflow").run(untouched) == [(True,) * 4] * 2

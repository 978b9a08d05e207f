"""Models that SENG watches, written as SavedModels; layers whose input is sparse."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras
import tensorflow as tf

import hvd_ext.tensorflow.keras as hvd
from tests.tensorflow import training

pytestmark = pytest.mark.distributed


def exported(folder):
    """What the model gives before, and each SavedModel after; the weights' change in a step after it."""
    model = training.dense_model()
    seng = hvd.SENG(model, damping=0.5)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), preconditioner=seng), "mse")
    x, y = training.data()
    model.train_on_batch(x[:4], y[:4])
    expected = model.predict(x[:4], verbose=0)
    model.export(f"{folder}/export{hvd.rank()}", verbose=False)
    tf.saved_model.save(model, f"{folder}/saved{hvd.rank()}")
    one, other = (tf.saved_model.load(f"{folder}/{how}{hvd.rank()}") for how in ("export", "saved"))
    served, signature = one.serve(x[:4]), other.signatures["serving_default"]
    before = training.weights(model)
    model.train_on_batch(x[4:8], y[4:8])
    moved = any(not np.array_equal(a, b) for a, b in zip(before, training.weights(model), strict=True))
    return expected, np.array(served), np.array(next(iter(signature(tf.constant(x[:4])).values()))), moved


def test_a_watched_model_is_exported(ranks, tmp_path):
    for expected, *found, moved in ranks(2, init="tensorflow").run(exported, str(tmp_path)):
        for one in found:
            np.testing.assert_allclose(one, expected, rtol=1e-6)
        assert moved


def with_sparse_input():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((40,), sparse=True), keras.layers.Dense(8, activation="tanh"),
                              keras.layers.Dense(3)])
    with pytest.warns(UserWarning, match="takes a sparse input"):
        seng = hvd.SENG(model, damping=0.5)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), preconditioner=seng,
                                           sparse_as_dense=True), "mse")
    rng = np.random.default_rng(hvd.rank())
    rows = tf.data.Dataset.from_tensor_slices((
        (rng.random((8, 40)) < 0.2).astype("float32"), rng.normal(size=(8, 3)).astype("float32")))
    model.fit(rows.batch(4).map(lambda x, y: (tf.sparse.from_dense(x), y)), verbose=0)
    hvd.assert_replicas_equal(model)
    return str(seng.report())


def test_a_layer_with_a_sparse_input_is_left_out(ranks):
    for said in ranks(2, init="tensorflow").run(with_sparse_input):
        assert "takes a sparse input" in said

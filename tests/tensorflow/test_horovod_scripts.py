"""Horovod's examples after the one-line change of the import, and with one extension each."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras

from tests.tensorflow import horovod_scripts

SCRIPTS = {  # what they import, and the extension that each is given the second time
    "keras_mnist": ("hvd_ext.keras", lambda hvd: {"server": "sharded"}),
    "keras_imagenet": ("hvd_ext.keras", lambda hvd: {"op": hvd.DelayCompensated(lam=1.0)}),
    "tensorflow2_keras_mnist": ("hvd_ext.tensorflow.keras",
                                lambda hvd: {"compression": hvd.Compression.topk(0.1, min_size=1)}),
    "tensorflow2_mnist": ("hvd_ext.tensorflow",
                          lambda hvd: {"compression": hvd.Compression.topk(0.1, min_size=1)}),
    "tensorflow2_synthetic": ("hvd_ext.tensorflow", lambda hvd: {"op": hvd.DelayCompensated(lam=1.0)}),
    "tensorflow2_mnist_elastic": ("hvd_ext.tensorflow",
                                  lambda hvd: {"compression": hvd.Compression.powersgd(1)}),
    "tensorflow2_keras_mnist_elastic": ("hvd_ext.tensorflow.keras", lambda hvd: {"server": "rank0"}),
}


def both_ways(name, folder):
    """The trained weights without an extension and with one."""
    module, extension = SCRIPTS[name]
    hvd = importlib.import_module(module)
    script = getattr(horovod_scripts, name)
    return [script(hvd, options, folder) for options in ({}, extension(hvd))]


@pytest.mark.distributed
@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_and_leaves_equal_replicas(ranks, tmp_path, name):
    first, second = ranks(2, init="tensorflow").run(both_ways, name, str(tmp_path), timeout=150)
    start = [np.array(one) for one in horovod_scripts.classifier().get_weights()]
    for mine, other in zip(first, second, strict=True):
        for one, same in zip(mine, other, strict=True):
            np.testing.assert_array_equal(one, same)
            assert np.isfinite(one).all()
        assert any(not np.allclose(one, before) for one, before in zip(mine, start, strict=True))


def test_best_model_checkpoint(tmp_path):
    hvd = importlib.import_module("hvd_ext.keras")
    best = hvd.callbacks.BestModelCheckpoint(monitor="loss")
    model = horovod_scripts.classifier()
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="has no file: set its filepath"):
        model.fit(*horovod_scripts.images(), verbose=0, callbacks=[best])
    best.filepath = str(tmp_path / "best.keras")
    model.fit(*horovod_scripts.images(), verbose=0, callbacks=[best])
    assert keras.models.load_model(best.filepath).built

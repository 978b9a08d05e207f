"""Process sets under Keras: members train as if there were nobody else, the others alone."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras

import hvd_ext.tensorflow as hvd_tf
import hvd_ext.tensorflow.keras as hvd
from tests.ranks import run_ranks
from tests.tensorflow import training

pytestmark = pytest.mark.distributed
SETTINGS = {
    "plain": lambda model: {},
    "delay": lambda model: {"op": hvd.DelayCompensated()},
    "topk": lambda model: {"compression": hvd.Compression.topk(0.3, min_size=0)},
    "sharded": lambda model: {"server": "sharded"},
    "rank0": lambda model: {"server": "rank0"},
    "late": lambda model: {"overlap": hvd.DelayedUpdate()},
    "seng": lambda model: {"preconditioner": hvd.SENG(model, damping=0.5)},
}


def only_rank_1(folder):
    """By settings: this rank's weights, and those of one process on its rows; what rank 0 is told."""
    members = hvd_tf.add_process_set([1])
    found, said = {}, []
    for name, settings in SETTINGS.items():
        model = training.dense_model()
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), process_set=members,
                                             **settings(model))
        model.compile(optimizer, "mse")
        x, y = training.data(hvd.rank())
        for step in range(2):
            rows = slice(4 * step, 4 * step + 4)
            model.train_on_batch(x[rows], y[rows])
        found[name] = training.weights(model)
        assert "sent" in optimizer.report()
        hvd.assert_replicas_equal(model, process_set=members)
        if hvd.rank() == 0:
            with pytest.raises(ValueError, match="on those ranks only") as caught:
                hvd.save_checkpoint(f"{folder}/run", 1, model=model, optimizer=optimizer)
            said.append(str(caught.value))
            with pytest.raises(ValueError, match="on those ranks only") as caught:
                hvd.save_model(model, f"{folder}/model.keras")
            said.append(str(caught.value))
    hvd_tf.remove_process_set(members)
    return found, said


def test_ranks_outside_train_alone(tmp_path):
    model = training.dense_model()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    x, y = training.data(0)
    for step in range(2):
        model.train_on_batch(x[4 * step : 4 * step + 4], y[4 * step : 4 * step + 4])
    (outside, said), (_, nothing) = run_ranks(
        only_rank_1, 2, str(tmp_path), init="tensorflow", timeout=200,
        env={"HOROVOD_DYNAMIC_PROCESS_SETS": "1"})
    for name, weights in outside.items():
        for one, other in zip(weights, training.weights(model), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7, err_msg=name)
    assert len(said) == 2 * len(SETTINGS)
    assert all("rank 0, outside of the process set of ranks [1]" in one for one in said)
    assert nothing == []

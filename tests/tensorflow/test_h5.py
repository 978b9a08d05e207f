"""Files in Keras' older .h5 format, as Horovod's examples write them, under every ``server=``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.tensorflow import training  # noqa: E402

LOSS = {"mse": keras.losses.mean_squared_error}  # Keras 3 does not read this name back from an .h5 file


def state_of(optimizer):
    return [np.array(one) for one in optimizer.variables]


def saved(folder, server):
    """Checkpoints of rank 0 while training goes on, a file of each rank, and one for all."""
    folder = Path(folder)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), server=server)
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    if hvd.rank() == 0:
        callbacks.append(keras.callbacks.ModelCheckpoint(str(folder / "checkpoint-{epoch}.h5")))
    model = training.fit(training.dense_model(), optimizer, hvd.rank(), hvd.size(), callbacks=callbacks)
    hvd.assert_replicas_equal(model)
    model.save(folder / f"{hvd.rank()}.h5")
    hvd.save_model(model, folder / "all.h5")
    before = state_of(optimizer)

    mine = hvd.load_model(folder / f"{hvd.rank()}.h5", server=server, custom_objects=LOSS)
    for found, expected in zip(state_of(mine.optimizer), before, strict=True):
        np.testing.assert_array_equal(found, expected)
    together = hvd.load_model(folder / "all.h5", server=server, custom_objects=LOSS)
    for found, expected in zip(state_of(together.optimizer), before, strict=True):
        np.testing.assert_array_equal(found, expected)
    if server != "replicated":
        with pytest.raises(RuntimeError, match=f"that of rank {1 - hvd.rank()} of 2"):
            hvd.load_model(folder / f"{1 - hvd.rank()}.h5", server=server, custom_objects=LOSS)
    training.fit(together, together.optimizer, hvd.rank(), hvd.size(), epochs=1)
    hvd.assert_replicas_equal(together)
    return training.weights(model)


@pytest.mark.distributed
@pytest.mark.parametrize("server", ["replicated", "rank0", "sharded"])
def test_checkpoints_in_h5(ranks, tmp_path, server):
    by_rank = ranks(2, init="tensorflow").run(saved, str(tmp_path), server, timeout=120)
    one = training.fit_joined(training.dense_model(), keras.optimizers.Adam(0.01), 2)
    for mine, reference in zip(by_rank[0], training.weights(one), strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-5)
    assert (tmp_path / "checkpoint-2.h5").exists()

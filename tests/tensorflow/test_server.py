"""``server="rank0"`` and ``"sharded"``: the trajectory of one process, state only where it is owned."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.tensorflow import training  # noqa: E402

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "amsgrad": lambda: hvd.AMSGrad(0.01),
    "clipped and accumulated": lambda: keras.optimizers.Adam(
        0.01, global_clipnorm=0.1, gradient_accumulation_steps=2),
}


def trained(server):
    """Weights by optimizer, and how many numbers of Adam's state this rank keeps."""
    found = {}
    for name, make in OPTIMIZERS.items():
        optimizer = hvd.DistributedOptimizer(make(), server=server)
        model = training.fit(training.dense_model(), optimizer, hvd.rank(), hvd.size(),
                             callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0),
                                        hvd.callbacks.AssertReplicasEqualCallback(2)])
        state = sum(int(np.prod(v.shape)) for v in optimizer.variables if len(v.shape) > 0)
        found[name] = training.weights(model), state
    return found


def assert_as_one_process(by_rank, size):
    for name, make in OPTIMIZERS.items():
        one = training.fit_joined(training.dense_model(), make(), size)
        for rank in by_rank:
            for mine, first, reference in zip(rank[name][0], by_rank[0][name][0],
                                              training.weights(one), strict=True):
                np.testing.assert_array_equal(mine, first)
                np.testing.assert_allclose(mine, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize("server", ["rank0", "sharded"])
def test_same_trajectory_with_state_only_at_the_owner(ranks, server):
    by_rank = ranks(2, init="tensorflow").run(trained, server, timeout=200)
    assert_as_one_process(by_rank, 2)
    weights, stamp = 5 * 8 + 8 + 8 * 3 + 3, 2
    kept = [rank["momentum"][1] - stamp for rank in by_rank]
    assert sum(kept) == weights
    assert (kept[1] == 0) if server == "rank0" else (0.3 * weights < min(kept))


def save_and_continue(folder):
    rank, size = hvd.rank(), hvd.size()
    model = training.fit(training.dense_model(),
                         hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), server="sharded"),
                         rank, size)
    path = f"{folder}/model{rank}.keras"
    model.save(path)
    hvd.allreduce([0.0], name="saved")
    with pytest.raises(ValueError, match=f"this is rank {rank} of 2"):
        hvd.load_model(f"{folder}/model{1 - rank}.keras", server="sharded")
    again = hvd.load_model(path, server="sharded")
    for one in (model, again):
        training.fit(one, one.optimizer, rank, size, epochs=1)
    return [training.weights(one) for one in (model, again)]


@pytest.mark.ranks
def test_save_load_continue(ranks, tmp_path):
    for rank in ranks(2, init="tensorflow").run(save_and_continue, str(tmp_path), timeout=150):
        for mine, reference in zip(rank[1], rank[0], strict=True):
            np.testing.assert_array_equal(mine, reference)


def test_bad_input():
    sgd = keras.optimizers.SGD
    with pytest.raises(ValueError, match="server must be one of"):
        hvd.DistributedOptimizer(sgd(0.1), server="rank1")
    with pytest.raises(NotImplementedError, match="use_ema"):
        hvd.DistributedOptimizer(sgd(0.1, use_ema=True), server="rank0")
    built = sgd(0.1)
    built.build([tf.Variable(1.0)])
    with pytest.raises(ValueError, match="state already"):
        hvd.DistributedOptimizer(built, server="sharded")
    with pytest.raises(NotImplementedError, match="way of its own"):
        hvd.DistributedOptimizer(training.OPTIMIZERS["multi"](), server="rank0")
    assert hvd.DistributedOptimizer(sgd(0.1), server="replicated")._hvd_ext.server is None

"""``hvd.join()`` with an extension: a barrier, and an error on all ranks where one of them trains on."""

from __future__ import annotations

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402
import numpy as np  # noqa: E402

import hvd_ext.tensorflow as hvd  # noqa: E402
from tests.ranks import run_program  # noqa: E402

pytestmark = pytest.mark.distributed

EXTENSIONS = {
    "delay": lambda model: {"op": hvd.DelayCompensated()},
    "topk": lambda model: {"compression": hvd.Compression.topk(0.1, min_size=0)},
    "sharded": lambda model: {"server": "sharded"},
    "seng": lambda model: {"preconditioner": hvd.SENG(model, damping=0.1, update_freq=2)},
}


def weights_of_training(name, joins):
    """The weights after four steps; with ``joins`` the ranks join after every second one."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9),
                                           **EXTENSIONS[name](model)), "mse")
    rng = np.random.default_rng(hvd.rank())
    for step in range(4):
        model.train_on_batch(rng.normal(size=(5, 6)), rng.normal(size=(5, 4)))
        if joins and step % 2:
            last = int(hvd.join())
            assert hvd.allgather_object(last) == [last] * hvd.size()
            hvd.broadcast_variables(model.variables, root_rank=last)
    return b"".join(weight.tobytes() for weight in model.get_weights())


@pytest.mark.parametrize("name", EXTENSIONS)
def test_join_is_a_barrier(ranks, name):
    pool = ranks(2, init="tensorflow")
    first, second = pool.run(weights_of_training, name, True, timeout=120)
    assert first == second
    assert pool.run(weights_of_training, name, False, timeout=120) == [first, second]


def join_in_a_graph():
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), server="sharded")
    with pytest.raises(RuntimeError, match="inside of a graph"):
        tf.function(hvd.join)()
    del optimizer


def test_join_in_a_graph(ranks):
    ranks(2, init="tensorflow").run(join_in_a_graph)


@pytest.mark.idle_ranks
@pytest.mark.parametrize(("name", "launcher"), [("topk", "mpirun"), ("sharded", "gloo")])
def test_a_rank_that_trains_on(name, launcher):
    # The time limit is ten minutes: it is not what ends the ranks.
    status, output = run_program("tests.tensorflow.failing_program", "join", name, framework="tensorflow",
                                 launcher=launcher, HVD_EXT_TIMEOUT="600")
    assert status != 0, output
    said = "rank 0 trains on (has waited"
    assert f"RuntimeError: {said}" in output, output
    assert f"rank 0 ends because rank 1 failed: RuntimeError: {said}" in output, output

"""``hvd.join()`` with an extension: a barrier, and an error on all ranks where one of them trains on."""

from __future__ import annotations

import pytest
import torch

import hvd_ext.torch as hvd
from tests.ranks import run_program
from tests.torch.problems import bits

pytestmark = pytest.mark.distributed

EXTENSIONS = {
    "delay": lambda model: {"op": hvd.DelayCompensated()},
    "topk": lambda model: {"compression": hvd.Compression.topk(0.1, min_size=0)},
    "powersgd": lambda model: {"compression": hvd.Compression.powersgd(min_compression=1.0)},
    "sharded": lambda model: {"server": "sharded"},
    "rank0": lambda model: {"server": "rank0"},
    "late": lambda model: {"overlap": hvd.DelayedUpdate()},
    "seng": lambda model: {"preconditioner": hvd.SENG(model, damping=0.1, update_freq=2)},
}


def weights_of_training(name, joins):
    """The weights after four steps; with ``joins`` the ranks join after every second one."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
                                         named_parameters=model.named_parameters(),
                                         **EXTENSIONS[name](model))
    generator = torch.Generator().manual_seed(hvd.rank())
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 6, generator=generator)).pow(2).mean().backward()
        optimizer.step()
        if joins and step % 2:
            last = hvd.join()
            assert hvd.allgather_object(last) == [last] * hvd.size()
            hvd.broadcast_parameters(model.state_dict(), root_rank=last)
    optimizer.flush()
    return bits(model.parameters())


@pytest.mark.parametrize("name", EXTENSIONS)
def test_join_is_a_barrier(ranks, name):
    pool = ranks(2)
    first, second = pool.run(weights_of_training, name, True)
    assert first == second
    assert pool.run(weights_of_training, name, False) == [first, second]


@pytest.mark.idle_ranks
@pytest.mark.parametrize(("name", "launcher"), [
    ("topk", "mpirun"), ("topk", "gloo"), ("sharded", "mpirun"), ("late", "mpirun"), ("seng", "mpirun"),
    ("powersgd", "mpirun")])
def test_a_rank_that_trains_on(name, launcher):
    # The time limit is ten minutes: it is not what ends the ranks.
    status, output = run_program("tests.torch.failing_program", "join", name, framework="torch",
                                 launcher=launcher, HVD_EXT_TIMEOUT="600")
    assert status != 0, output
    said = "rank 0 trains on (has waited"
    assert f"RuntimeError: {said}" in output, output
    assert f"rank 0 ends because rank 1 failed: RuntimeError: {said}" in output, output
    assert output.count("put the loop over the batches into `with "
                        "hvd.uneven_inputs(optimizer):`") >= 4, output

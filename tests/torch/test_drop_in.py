"""A script written for Horovod does the same, bit for bit, after the one-line change of its import."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.torch.problems import bits

pytestmark = pytest.mark.distributed


def script(module):
    """What Horovod scripts do, with the front end of that name."""
    hvd = importlib.import_module(module)
    hvd.init()
    torch.manual_seed(hvd.rank())
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    seen = []
    for options in ({}, {"compression": hvd.Compression.fp16}, {"op": hvd.Sum}, {"op": hvd.Adasum},
                    {"gradient_predivide_factor": 2.0}, {"groups": 2},
                    {"backward_passes_per_step": 2}):
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU(),
                                    torch.nn.Linear(5, 3))
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), **options)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(options.get("backward_passes_per_step", 1)):
                torch.nn.functional.cross_entropy(model(x), y).backward()
            if options.get("op") != hvd.Adasum:
                optimizer.synchronize()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                optimizer.step()
            scheduler.step()
        seen.append(bits(model.parameters()))
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, epoch=3)
    state.sync()
    seen.append(float(hvd.allreduce(torch.tensor(hvd.rank() + 1.0), name="metric")))
    seen.append(hvd.allgather(torch.full((hvd.rank() + 1,), hvd.rank())).tolist())
    seen.append(hvd.broadcast_object({"epoch": hvd.rank()}, root_rank=1))
    assert hvd.join() in range(hvd.size())  # the rank that joined last, a matter of time
    return seen


@pytest.mark.parametrize("size", [2])
def test_the_import_is_all_that_changes(ranks, size):
    pool = ranks(size)
    before = pool.run(script, "horovod.torch")
    after = pool.run(script, "hvd_ext.torch")
    assert before == after
    assert before[0][:7] == before[1][:7]  # and the replicas are alike

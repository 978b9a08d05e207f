"""``hvd_ext.run``: Horovod's way to start ranks from Python, with extensions in what they run."""

from __future__ import annotations

import pytest

from hvd_ext import run

pytestmark = [pytest.mark.distributed, pytest.mark.idle_ranks]


def test_a_function_trains_on_ranks():
    def train(scale, *, steps):  # pickled by value: the ranks know nothing of this file
        import torch

        import hvd_ext.torch as hvd

        hvd.init()
        torch.manual_seed(hvd.rank())
        model = torch.nn.Linear(16, 4)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(),
            compression=hvd.Compression.topk(0.1, min_size=0))
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        for _ in range(steps):
            optimizer.zero_grad()
            (scale * model(torch.randn(8, 16))).pow(2).mean().backward()
            optimizer.step()
        return hvd.rank(), hvd.size(), model.weight.tolist()

    first, second = run(train, args=(2.0,), kwargs={"steps": 3}, np=2, use_gloo=True)
    assert (first[:2], second[:2]) == ((0, 2), (1, 2))
    assert first[2] == second[2]

"""``torch.compile(model)`` on two ranks: the same training as without, for each way to reduce."""

from __future__ import annotations

import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import bits, flat

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def options_of(case):
    return {"plain": {}, "delay": {"op": hvd.DelayCompensated()},
            "topk": {"compression": hvd.Compression.topk(0.25, min_size=0)},
            "sharded": {"server": "sharded"}}[case]


def train(case, compiled):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
                                         named_parameters=model.named_parameters(), **options_of(case))
    run = torch.compile(model) if compiled else model
    generator = torch.Generator().manual_seed(hvd.rank())
    for _ in range(4):
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(run(x), y).backward()
        optimizer.step()
    return torch.from_numpy(flat(model.parameters())), bits(model.parameters())


def test_compiled_as_eager(ranks):
    pool = ranks(2)
    for case in ("plain", "delay", "topk", "sharded"):
        eager, compiled = (pool.run(train, case, how, timeout=240) for how in (False, True))
        assert compiled[0][1] == compiled[1][1], case
        torch.testing.assert_close(compiled[0][0], eager[0][0], rtol=1e-6, atol=1e-6)

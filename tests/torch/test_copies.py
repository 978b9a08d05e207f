"""A copy or pickle of a distributed optimizer is the optimizer that was wrapped, with nothing shared."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import hvd_ext.torch as hvd

pytestmark = pytest.mark.distributed


def wrap(model, case):
    options = {"plain": {}, "topk": {"compression": hvd.Compression.topk(0.1, min_size=1)},
               "delay": {"op": hvd.DelayCompensated()}, "adasum": {"op": hvd.Adasum}}.get(case, {})
    if case == "seng":
        options = {"preconditioner": hvd.SENG(model, damping=0.5)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), **options)


def copies(case):
    torch.manual_seed(3)
    model = torch.nn.Linear(4, 3)
    optimizer = wrap(model, case)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)),
                 torch.load(file, weights_only=False)):
        assert type(twin) is torch.optim.SGD
        assert twin.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.025
        theirs = [p for group in twin.param_groups for p in group["params"]]
        for mine, other in zip(model.parameters(), theirs, strict=True):
            assert other is not mine
            assert torch.equal(mine, other)
            assert torch.equal(optimizer.state[mine]["momentum_buffer"], twin.state[other]["momentum_buffer"])
        before = [p.detach().clone() for p in model.parameters()]
        for p in theirs:
            p.grad = torch.ones_like(p)
        twin.step()  # alone, without the other rank
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert not torch.equal(theirs[0], before[0])
    again = copy.deepcopy(scheduler)
    assert type(again.optimizer) is torch.optim.SGD
    assert again.get_last_lr() == scheduler.get_last_lr()
    fresh = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 1, gamma=0.5)
    fresh.load_state_dict(pickle.loads(pickle.dumps(scheduler.state_dict())))
    assert fresh.last_epoch == 2
    optimizer.zero_grad()
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()  # the original goes on
    return True


@pytest.mark.parametrize("case", ["plain", "topk", "delay", "seng"])
def test_copy_and_pickle(ranks, case):
    assert ranks(2).run(copies, case) == [True, True]


def adasum():
    model = torch.nn.Linear(4, 3)
    optimizer = wrap(model, "adasum")
    twins = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    return [type(twin) is torch.optim.SGD for twin in twins]


def test_horovods_own(ranks):
    assert ranks(2).run(adasum) == [[True, True]] * 2


def of_a_server(where):
    model = torch.nn.Linear(4, 3)
    optimizer = hvd.DistributedOptimizer(torch.optim.Adam(model.parameters()), server=where)
    with pytest.raises(TypeError, match=r"on other ranks only; save optimizer\.gather_state_dict"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="gather_state_dict"):
        pickle.dumps(optimizer)
    return True


def test_moments_that_are_elsewhere_cannot_be_copied(ranks):
    assert ranks(2).run(of_a_server, "sharded") == [True, True]

"""``torch.distributed.checkpoint``: everything comes back, or a message names what does not."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as tool

import hvd_ext.torch as hvd
from tests.torch.problems import bits
from tests.torch.seng_on_ranks import LAM, data, loss_of, network
from tests.torch.small import same

pytestmark = pytest.mark.distributed
METHODS = {
    "plain": dict,
    "topk": lambda: {"compression": hvd.Compression.topk(0.3, min_size=0)},
    "topk_owners": lambda: {"compression": hvd.Compression.topk(0.3, exchange="sparse_allreduce")},
    "powersgd": lambda: {"compression": hvd.Compression.powersgd(rank=1, min_compression=1.0)},
    "delay": lambda: {"op": hvd.DelayCompensated()},
    "overlap": lambda: {"overlap": hvd.DelayedUpdate()},
    "sharded": lambda: {"server": "sharded"},
    "seng": lambda: {"preconditioner": lambda model: hvd.SENG(model, damping=LAM)},
}


def build(method):
    model, options = network(), METHODS[method]()
    if "preconditioner" in options:
        options["preconditioner"] = options["preconditioner"](model)
    return model, hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
                                           named_parameters=model.named_parameters(), **options)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, data(hvd.rank(), step, 5)).backward()
        optimizer.step()


def save_and_load(method, folder, from_optimizer):
    """What a load warns of, or raises; whether it brings back the state, and the weights two steps later."""
    place, (model, optimizer), (again, other) = folder / str(hvd.rank()), build(method), build(method)

    def states(model, optimizer):
        found = optimizer.state_dict() if from_optimizer else tool.get_optimizer_state_dict(model, optimizer)
        return {"optimizer": found, "model": model.state_dict()}

    train(model, optimizer, range(3))
    if from_optimizer:
        train(again, other, range(2))  # a load fills in what is there
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.save(states(model, optimizer), checkpoint_id=place, no_dist=True)
        loaded = states(again, other)
        dcp.load(loaded, checkpoint_id=place, no_dist=True)
        again.load_state_dict(loaded["model"])
        try:
            if from_optimizer:
                other.load_state_dict(loaded["optimizer"])
            else:
                tool.set_optimizer_state_dict(again, other, loaded["optimizer"])
        except RuntimeError as error:
            return str(error), False
    whole = same(other.state_dict(), optimizer.state_dict())
    for one in ((model, optimizer), (again, other)):
        train(*one, range(3, 5))
    whole &= bits(model.parameters()) == bits(again.parameters())
    return " ".join(str(one.message) for one in caught if "hvd_ext" in str(one.message)), whole


@pytest.mark.parametrize("method", METHODS)
def test_the_optimizers_own_state_comes_back_whole(ranks, tmp_path, method):
    assert ranks(2).run(save_and_load, method, tmp_path, True) == [("", True)] * 2


@pytest.mark.parametrize(("method", "named"), [
    ("topk", "Compression.topk"), ("topk_owners", "Compression.topk"), ("powersgd", "Compression.powersgd"),
    ("delay", "DelayCompensated"), ("overlap", "overlap="), ("seng", "SENG")])
def test_what_the_tool_leaves_out_is_named(ranks, tmp_path, method, named):
    first, second = ranks(2).run(save_and_load, method, tmp_path, False)
    assert f"holds nothing of {named}, whose state begins new on every rank" in first[0]
    assert not first[1]
    assert second == ("", False)


def test_plain_reduction_and_moments_that_other_ranks_own(ranks, tmp_path):
    pool = ranks(2)
    assert pool.run(save_and_load, "plain", tmp_path / "plain", False) == [("", True)] * 2
    for said, _ in pool.run(save_and_load, "sharded", tmp_path / "sharded", False):
        assert "Missing optimizer state for parameter" in said

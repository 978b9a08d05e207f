"""States loaded between settings: everything is restored, or refused by name before anything is changed."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.small import same

pytestmark = pytest.mark.distributed
SETTINGS = {
    "none": lambda model: {},
    "replicated": lambda model: {"server": "replicated"},
    "rank0": lambda model: {"server": "rank0"},
    "sharded": lambda model: {"server": "sharded"},
    "reply": lambda model: {"server": hvd.Server("sharded", downlink=hvd.Compression.topk(0.3, min_size=1))},
    "topk": lambda model: {"compression": hvd.Compression.topk(0.3, min_size=1)},
    "topk_sparse": lambda model: {"compression": hvd.Compression.topk(
        0.3, min_size=1, exchange="sparse_allreduce")},
    "delay": lambda model: {"op": hvd.DelayCompensated()},
    "powersgd": lambda model: {"compression": hvd.Compression.powersgd(1, min_compression=1.0)},
    "late": lambda model: {"overlap": hvd.DelayedUpdate()},
    "late_topk": lambda model: {"overlap": hvd.DelayedUpdate(),
                                "compression": hvd.Compression.topk(0.3, min_size=1)},
    "late_delay": lambda model: {"overlap": hvd.DelayedUpdate(), "op": hvd.DelayCompensated()},
    "seng": lambda model: {"preconditioner": hvd.SENG(model, damping=0.5, update_freq=2)},
}
EXTENSIONS = {"topk": {"topk"}, "topk_sparse": {"topk"}, "delay": {"delay"}, "powersgd": {"powersgd"},
              "late": {"late"}, "late_topk": {"late", "topk"}, "late_delay": {"late", "delay"},
              "seng": {"seng"}}


def build(name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 8))
    options = SETTINGS[name](model)
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters(), **options)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + hvd.rank())
        optimizer.zero_grad()
        model(torch.randn(8, 16, generator=generator)).square().mean().backward()
        optimizer.step()


def saved_states():
    found = {}
    for name in SETTINGS:
        model, optimizer = build(name)
        train(model, optimizer, range(3))
        found[name] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    return found


def held(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def every_pair():
    """By pair: "" where it was loaded, else the error; whether a refused load changed anything, and whether a
    loaded state is what was saved."""
    states, found = saved_states(), {}
    for here in SETTINGS:
        model, optimizer = build(here)
        train(model, optimizer, range(2))
        for saved, (_, state) in states.items():
            before = held(optimizer)
            try:
                optimizer.load_state_dict(copy.deepcopy(state))
                said = ""
            except ValueError as error:
                said = str(error)
            after = held(optimizer)
            if said:
                right = same(before, after)
            else:
                own, now = state["hvd_ext"], after["hvd_ext"]
                right = all(same(now["reducer"].get(key), value) for key, value in own["reducer"].items())
                right &= same(own.get("preconditioner"), now.get("preconditioner")) or here == "seng"
                if here not in ("sharded", "rank0", "reply"):
                    right &= same(state["state"], after["state"])
            found[saved, here] = said, right
    return found


def test_every_pair_restores_everything_or_is_refused(ranks):
    by_rank = ranks(2).run(every_pair, timeout=300)
    for rank, found in enumerate(by_rank):
        assert len(found) == len(SETTINGS) ** 2
        for (saved, here), (said, right) in found.items():
            assert right, (rank, saved, here, said)
            missing = EXTENSIONS.get(saved, set()) - EXTENSIONS.get(here, set())
            partly = saved in ("sharded", "reply") or (saved == "rank0" and rank == 1)
            if missing:
                assert "which would drop what" in said, (saved, here)
            elif saved == "reply" and here != "reply":
                assert "saved with Server(downlink=...)" in said, (saved, here)
            elif partly and here not in ("sharded", "reply") and not (here == "rank0" and rank == 1):
                assert "gather_state_dict()" in said, (saved, here)


def from_rank_0(name, how):
    """Horovod's ways to resume: every rank loads rank 0's state, or rank 0 alone; then both broadcast."""
    model, optimizer = build(name)
    train(model, optimizer, range(4))
    weights, state = hvd.broadcast_object(copy.deepcopy((model.state_dict(), optimizer.state_dict())), 0,
                                          name="state")
    if how != "running":
        model, optimizer = build(name)
    else:  # a job goes back to an earlier state
        train(model, optimizer, range(4, 7))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "all" or hvd.rank() == 0:
            model.load_state_dict(weights)
            optimizer.load_state_dict(copy.deepcopy(state))
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    said = [str(one.message) for one in caught if "begin new" in str(one.message)]
    counters = {key: value for key, value in optimizer.state_dict()["hvd_ext"]["reducer"].items()
                if key in ("steps", "q", "late")}
    expected = {key: value for key, value in state["hvd_ext"]["reducer"].items() if key in counters}
    train(model, optimizer, range(7, 10))
    hvd.assert_replicas_equal(model, optimizer=None if name == "rank0" else optimizer)
    return said, same(counters, expected)


@pytest.mark.parametrize("name", ["none", "replicated", "rank0", "topk", "topk_sparse", "delay", "powersgd",
                                  "late", "late_topk", "seng"])
def test_horovods_resume(ranks, name):
    for how in ("rank 0", "all", "running"):
        by_rank = ranks(2).run(from_rank_0, name, how)
        warned = [text for said, _ in by_rank for text in said]
        assert all(right for _, right in by_rank), how
        if name in ("topk", "topk_sparse", "delay", "powersgd", "late_topk", "seng"):
            assert len(warned) == 1, (how, warned)
            assert "hvd.save_checkpoint" in warned[0]
        else:
            assert warned == [], how

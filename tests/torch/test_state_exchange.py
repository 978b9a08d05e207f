"""Nested state that travels between ranks: every structure, dtype and layout arrives as it was sent."""

from __future__ import annotations

import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.torch import collectives as module
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.persistence import state_exchange
from tests.torch.small import same


def tree(rank):
    """One rank's state; ranks have other numbers of tensors, and one of them none of a dtype."""
    generator = torch.Generator().manual_seed(rank)
    drawn = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (), (0, 2), (2, 3, 4, 5))]
    state = {
        3: {"step": torch.tensor(float(rank)), "exp_avg": drawn[0], "exp_avg_sq": drawn[1].double()},
        "by name": [drawn[2], (drawn[3], "text", None, 1.5, rank)],
        "half": {"moments": drawn[0].to(torch.bfloat16), "flag": torch.tensor([True, False])},
        "sparse": torch.eye(3).to_sparse(),
        "layout": drawn[4].contiguous(memory_format=torch.channels_last),
        "nothing": {},
    }
    if rank:
        state["more"] = [torch.full((7,), rank + n, dtype=torch.int64) for n in range(rank * 3)]
        del state["half"]
    return state


def dense(thing):
    """The tree with its sparse tensors made dense, so that it can be compared."""
    if isinstance(thing, dict):
        return {key: dense(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return type(thing)(dense(value) for value in thing)
    return thing.to_dense() if isinstance(thing, torch.Tensor) and thing.is_sparse else thing


def exchanged():
    collectives = Collectives()
    rank, size = collectives.rank, collectives.size
    gathered = state_exchange.gather_states(collectives, tree(rank), "state")
    assert same(dense(gathered), dense([tree(one) for one in range(size)]))
    for root in range(size):
        given = tree(rank)
        found = state_exchange.broadcast_state(collectives, given, root, f"from{root}")
        assert same(dense(found), dense(tree(root)))
        assert (found is given) == (rank == root)
        if rank != root:  # a saved state must not drag the whole bucket along
            assert found[3]["exp_avg"].untyped_storage().nbytes() == 3 * 4 * 4
    return True


def test_a_structure_is_taken_apart_and_joined():
    for rank in range(2):
        given = tree(rank)
        structure, tensors = state_exchange.split_tensors(given)
        assert all(not one.is_sparse for one in tensors)
        assert same(dense(state_exchange.join_tensors(structure, tensors)), dense(given))


def test_buckets_hold_one_kind_and_at_most_so_many_bytes(monkeypatch):
    monkeypatch.setattr(state_exchange, "DEFAULT_BUCKET_BYTES", 64)
    spots = state_exchange._find_spots(state_exchange.split_tensors(
        [torch.zeros(10), torch.zeros(6), torch.zeros(1), torch.zeros(3, dtype=torch.float64),
         torch.zeros(99), torch.zeros(0), torch.zeros(2)])[0])
    found = {kind: [[spot.numel for spot in bucket] for bucket in buckets]
             for kind, buckets in state_exchange._by_kind(spots).items()}
    assert found == {("float32", "cpu"): [[10, 6], [1], [99], [0, 2]], ("float64", "cpu"): [[3]]}


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_get_what_others_have(ranks, size):
    assert ranks(size).run(exchanged) == [True] * size


def messages_of_gathering(count):
    """How many collectives ``gather_state_dict()`` of so many parameters submits, and what it gives."""
    parameters = [torch.nn.Parameter(torch.full((3,), float(n))) for n in range(count)]
    optimizer = hvd.DistributedOptimizer(torch.optim.Adam(parameters, lr=0.1), server="sharded",
                                         named_parameters=[(f"w{n}", p) for n, p in enumerate(parameters)])
    for _ in range(2):
        sum((n + 1) * p.sum() for n, p in enumerate(parameters)).backward()
        optimizer.step()
        optimizer.zero_grad()
    submitted, submit = [], module._submit_collective
    module._submit_collective = lambda *args, **kwargs: submitted.append(args) or submit(*args, **kwargs)
    try:
        state = optimizer.gather_state_dict()["state"]
    finally:
        module._submit_collective = submit
    return len(submitted), sorted(state), [float(state[n]["exp_avg"].mean()) for n in range(count)]


@pytest.mark.distributed
def test_state_is_gathered_by_bucket(ranks):
    few, many = (ranks(2).run(messages_of_gathering, count) for count in (2, 150))
    for (sent_for_few, *_), (sent, owned, averages) in zip(few, many, strict=True):
        assert sent == sent_for_few
        assert owned == list(range(150))
        assert averages == pytest.approx([0.19 * (n + 1) for n in range(150)])

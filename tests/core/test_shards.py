"""Pieces: every element has one owner, slices are even, messages lie in the order of the ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_ext.reducers.buckets import BucketKey, TensorSpec, plan_buckets
from hvd_ext.sharding import (
    OwnedState,
    assign_owners,
    by_owner,
    check_loadable,
    cut_evenly,
    elements_by_rank,
    orthogonalising_cost,
)

ALIGNED = 128
F32 = BucketKey("float32")


def buckets_of(numels, limit=6000):
    return plan_buckets([TensorSpec(str(i), (n,), 4, F32) for i, n in enumerate(numels)], bucket_bytes=limit)


numels = st.lists(st.integers(0, 1500), min_size=1, max_size=12)


@given(numels, st.integers(1, 9), st.booleans())
def test_every_element_has_one_owner_and_one_place(sizes, ranks, cut):
    owners = dict(enumerate(assign_owners(sizes, ranks)))
    messages = [cut_evenly(bucket, ranks) if cut else by_owner(bucket, owners, ranks)
                for bucket in buckets_of(sizes)]
    times = [np.zeros(n, int) for n in sizes]
    for message in messages:
        at = 0
        for rank, part in enumerate(message.parts):
            begin = at
            for piece in part:
                assert piece.offset == at
                at += piece.numel
                times[piece.index][piece.start : piece.stop] += 1
            assert message.splits[rank] == at - begin
        assert at == message.numel
        if cut:
            assert all(abs(split - message.numel / ranks) <= ALIGNED + 1 for split in message.splits)
            assert all(piece.start % ALIGNED == 0 and (piece.stop % ALIGNED == 0
                       or piece.stop == sizes[piece.index]) for piece in message.pieces)
    assert all((one == 1).all() for one in times)
    assert sum(elements_by_rank(messages, ranks)) == sum(sizes)


@given(numels, st.integers(1, 5), st.sets(st.integers(0, 11)))
def test_tensors_left_out_leave_no_gap(sizes, ranks, left_out):
    for bucket in buckets_of(sizes):
        message = cut_evenly(bucket, ranks).without_tensors(left_out)
        assert not {piece.index for piece in message.pieces} & left_out
        assert message.numel == sum(sizes[slot.index] for slot in bucket.slots if slot.index not in left_out)
        offsets = [piece.offset for piece in message.pieces]
        assert offsets == [sum(p.numel for p in message.pieces[:i]) for i in range(len(offsets))]


def test_moved_messages_are_of_other_tensors():
    message = cut_evenly(buckets_of([200, 100])[0], 2).renumbered(3, 100)
    assert message.index == 3
    assert {piece.index for piece in message.pieces} == {100, 101}


def test_owners_of_matrices_are_balanced_by_the_cost_of_orthogonalising():
    assert orthogonalising_cost((64, 256)) == 64 * 64 * 256 == orthogonalising_cost((256, 64))
    assert orthogonalising_cost((10,)) == 10
    shapes = [(1000, 10), (100, 100), (100, 100)]  # of equal size, the first much cheaper
    assert assign_owners([orthogonalising_cost(shape) for shape in shapes], 2) == [0, 0, 1]
    assert assign_owners([orthogonalising_cost(shape) for shape in shapes[:2]], 2) == [1, 0]


def test_parts_load_where_they_cover_what_is_needed():
    half = OwnedState("sharded", 0, 2, (0, 1), ((1, 0, 50),))
    check_loadable(half, half)
    check_loadable(half, OwnedState("sharded", 0, 4, (0, 1), ((0, 0, 3), (1, 10, 50))))
    check_loadable(OwnedState("rank0", 0, 2, None), half)
    check_loadable(OwnedState("sharded", 0, 2, (0, 1)), half)  # saved where each had one owner
    for here in (OwnedState("sharded", 0, 4, (1,), ((1, 40, 60),)), OwnedState("sharded", 0, 4, (1,)),
                 OwnedState("sharded", 0, 2, (2,)), OwnedState("replicated", 0, 2, None)):
        with pytest.raises(ValueError, match="2 parameters or parts of them"):
            check_loadable(half, here)
    assert OwnedState.from_dict(half.to_dict()) == half
    old = {"server": "sharded", "rank": 0, "size": 2, "owned": [0, 3]}  # of a version that did not cut
    assert OwnedState.from_dict(old) == OwnedState("sharded", 0, 2, (0, 3))

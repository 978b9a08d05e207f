"""Bucket plans, slices, the ranks' agreement: decisions tested without a process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from hvd_ext import checks
from hvd_ext.consistency.fingerprint import describe_mismatch, describe_settings, digest_parts
from hvd_ext.consistency.wire import pack_row, unpack_rows
from hvd_ext.reducers import registry
from hvd_ext.reducers.buckets import (
    MOST_BYTES,
    BucketKey,
    TensorSpec,
    check_groups,
    check_message,
    plan_buckets,
    slice_sizes,
    split_groups,
)
from hvd_ext.reducers.delay_compensation import DelayCompensated
from hvd_ext.reducers.delay_compensation.slices import VirtualWorker, all_usable, application_order
from hvd_ext.reducers.options import DenseReduction
from hvd_ext.reducers.topk import TopK
from hvd_ext.reducers.traffic import Traffic

FLOAT = BucketKey("float32")


def specs(*sizes, kind=FLOAT):
    return [TensorSpec(f"p{i}", (size,), 4, kind) for i, size in enumerate(sizes)]


def test_buckets_go_backwards_and_keep_their_size():
    plan = plan_buckets(specs(10, 20, 30, 5), bucket_bytes=4 * 35)
    assert [[slot.index for slot in bucket.slots] for bucket in plan] == [[3, 2], [1, 0]]
    assert [[slot.offset for slot in bucket.slots] for bucket in plan] == [[0, 5], [0, 20]]
    assert [bucket.numel for bucket in plan] == [35, 30]
    assert [bucket.index for bucket in plan] == [0, 1]


def test_a_tensor_larger_than_a_bucket_goes_alone():
    plan = plan_buckets(specs(1, 100, 1), bucket_bytes=8)
    assert [[slot.index for slot in bucket.slots] for bucket in plan] == [[2], [1], [0]]


def test_a_message_holds_what_mpi_can_count():
    for count, fits in ((MOST_BYTES // 4, True), (MOST_BYTES // 4 + 1, False)):
        tensors = specs(7, count - 7)
        bucket = plan_buckets(tensors, bucket_bytes=8 * MOST_BYTES)[0]
        if fits:
            check_message(bucket, tensors, "delay")
            continue
        said = f"of which p1 is {4 * (count - 7)}; MPI takes at most 2147483647"
        with pytest.raises(ValueError, match=said):
            check_message(bucket, tensors, "delay")


def test_kinds_do_not_share_a_bucket():
    mixed = [*specs(3, 4), TensorSpec("h", (5,), 2, BucketKey("float16"))]
    plan = plan_buckets(mixed, bucket_bytes=10**6)
    assert sorted(bucket.kind for bucket in plan) == [BucketKey("float16"), BucketKey("float32")]


def test_groups_make_buckets_whatever_their_size():
    plan = plan_buckets(specs(10, 20, 30, 5), bucket_bytes=4, groups=[[0, 2], [1]])
    assert [sorted(slot.index for slot in bucket.slots) for bucket in plan] == [[0, 2], [1], [3]]


def test_every_element_is_in_one_bucket_once():
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 50, 40).tolist()
    seen = {}
    for bucket in plan_buckets(specs(*sizes), bucket_bytes=256):
        end = 0
        for slot in bucket.slots:
            assert slot.offset == end
            end += slot.numel
            seen[slot.index] = slot.numel
    assert seen == dict(enumerate(sizes))


@pytest.mark.parametrize(("numel", "ranks"), [(0, 3), (1, 4), (7, 2), (10, 5), (11, 4)])
def test_slices_cover_all_and_are_as_equal_as_can_be(numel, ranks):
    sizes = slice_sizes(numel, ranks)
    assert sum(sizes) == numel
    assert max(sizes) - min(sizes) <= 1


def test_shorter_steps_come_first_and_ties_go_by_rank():
    workers = [VirtualWorker(0, 0, 4.0), VirtualWorker(1, 0, 1.0), VirtualWorker(2, 0, 4.0),
               VirtualWorker(1, 1, 0.5)]
    assert [(w.rank, w.part) for w in application_order(workers, "norm")] == [(1, 1), (1, 0), (0, 0), (2, 0)]
    assert [(w.rank, w.part) for w in application_order(workers, "rank")] == [(0, 0), (1, 0), (1, 1), (2, 0)]
    assert all_usable(workers)
    assert not all_usable([*workers, VirtualWorker(3, 0, math.nan)])
    assert not all_usable([*workers, VirtualWorker(3, 0, math.inf)])


def test_header_brings_every_ranks_numbers_back():
    rows = [[1.5, -0.0, math.inf], [], [math.nan]]
    gathered = np.concatenate([pack_row(7 + i, row) for i, row in enumerate(rows)])
    digests, back = unpack_rows(gathered)
    assert digests == [7, 8, 9]
    assert back[:2] == rows[:2]
    assert math.isnan(back[2][0])


def test_digest_tells_plans_apart_and_fits_the_header():
    assert digest_parts("a", specs(3)) == digest_parts("a", specs(3))
    assert digest_parts("a", specs(3)) != digest_parts("a", specs(4))
    assert 0 <= digest_parts("a") < 2**62


def test_differences_name_the_rank_and_the_parameter():
    lines = describe_mismatch([["a", "b"], ["a", "c"], ["b", "a"]])
    assert lines == ["rank 1 does not have b; has c", "rank 2 has the same in another order"]


def test_traffic_of_a_step_is_what_came_since_the_last():
    traffic = Traffic()
    traffic.count_bytes("values", sent=5)
    traffic.step()
    traffic.count_bytes("values", sent=7, received=2)
    traffic.step()
    assert dict(traffic.last_sent) == {"values": 7}
    assert dict(traffic.last_received) == {"values": 2}
    assert traffic.sent["values"] == 12


@pytest.mark.parametrize(("changed", "message"), [
    ({"op": DelayCompensated(), "compression": TopK()},
     "compression=Compression.topk and op=DelayCompensated cannot be combined"),
    ({"compression": TopK(), "op_name": "Adasum"}, "op=Adasum cannot be combined"),
    ({"op": DelayCompensated(), "predivide": 2.0}, "gradient_predivide_factor"),
    ({"server": "cloud"}, "'cloud'"),
    ({"multiple_evaluations": True}, "LBFGS"),
])
def test_combinations_without_meaning_are_refused(changed, message):
    settings = {"op": None, "compression": None, "op_name": "Average", "predivide": 1.0, "server": None}
    registry.check_combination(**settings)
    with pytest.raises(ValueError, match=message):
        registry.check_combination(**{**settings, **changed})


def test_horovods_operations_are_named_as_a_user_writes_them():
    assert [registry.public_op(op) for op in (0, 1, 2, 5)] == ["op=Average", "op=Sum", "op=Adasum",
                                                               "op=Product"]
    assert registry.describe_reduction(DenseReduction(1, None))[0] == "reduction: op=Sum"
    assert registry.public_op("other") == "op=other"


def test_a_bucket_says_only_what_sets_it_apart():
    assert str(BucketKey("float32", "cpu", route="topk")) == "float32 on cpu sent topk"
    assert str(TensorSpec("w", (2, 3), 4, BucketKey("float32", "cpu", 1))) == \
        "w[2, 3] float32 on cpu in parameter group 1"


def test_groups_are_split_as_horovod_splits_them():
    tensors = [object() for _ in range(5)]
    assert split_groups(2, tensors) == [[0, 1, 2], [3, 4]]
    assert split_groups(9, tensors) == [[0], [1], [2], [3], [4]]
    assert split_groups(None, tensors) is split_groups(0, tensors) is None
    assert split_groups([[tensors[3], tensors[1]], [object()], tensors[0]], tensors) == [[3, 1], [0]]
    assert split_groups(3, []) == []


@pytest.mark.parametrize(("groups", "message"), [
    (-1, "non-negative integer"), ("all", "non-negative integer"), ([["a"]], "consist of float"),
    ([[1.0], [1.0]], "only appear once"),
])
def test_groups_that_are_none_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        check_groups(groups, member=float, what="float", key=hash)


def test_settings_are_described_field_by_field():
    assert describe_settings(TopK(lambda step: 0.1)) == describe_settings(TopK(lambda step: 0.2))
    assert describe_settings(TopK(0.1)) != describe_settings(TopK(0.2))
    assert "lam=2.0" in describe_settings(DelayCompensated())


@dataclass(frozen=True)
class Method:
    slot: ClassVar[str] = "compression"
    label: ClassVar[str] = "mine"


def test_methods_are_registered_once():
    registry.check_registration(Method, {TopK: object})
    with pytest.raises(ValueError, match="'mine' is registered already, for Method"):
        registry.check_registration(Method, {Method: object})
    registry.check_registration(Method, {Method: object}, replace=True)
    with pytest.raises(TypeError, match="dataclass type"):
        registry.check_registration(float, {})
    with pytest.raises(ValueError, match="slot must be"):
        registry.check_registration(type("Bad", (Method,), {"slot": "elsewhere"}), {})


def test_messages_say_value_limit_and_way_out():
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got 1.5; pass 0.01"):
        checks.check_float("ratio", 1.5, low=0, high=1, open_low=True, hint="pass 0.01")
    with pytest.raises(ValueError, match=r"rank must be at least 1, got 0"):
        checks.check_int("rank", 0, low=1)
    with pytest.raises(TypeError, match=r"must be a whole number, got 1\.5"):
        checks.check_int("rank", 1.5, low=1)
    with pytest.raises(TypeError, match="must be a number, got True"):
        checks.check_float("lam", True)

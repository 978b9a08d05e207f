"""The message of a bucket: where things lie, how many bytes it is, what does not fit together."""

from __future__ import annotations

import pytest
import torch

from hvd_ext.reducers.buckets import Bucket, TensorSlice
from hvd_ext.reducers.topk import Layout, MessageError
from hvd_ext.reducers.topk.plan import Segment, check_bucket, plan_segments
from hvd_ext.reducers.topk.wire import check_messages
from hvd_ext.torch.reducers.kernels import topk as kernels


@pytest.mark.parametrize(("values", "expected"), [("float32", 808), ("float16", 608), ("float64", 1208)])
def test_bytes(values, expected):
    layout = Layout(100, values)
    assert sum(layout.bytes_by_kind().values()) == 4 * layout.words == expected
    assert layout.bytes_by_kind()["indices"] == 408


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("k", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_what_is_packed_comes_out_again(values, k, count):
    if count > k:
        return
    layout = Layout(k, values)
    dtype = getattr(torch, values)
    parts, expected = [], torch.zeros(50, dtype=torch.float64)
    for _ in range(3):
        positions = torch.randperm(50)[:count].sort().values
        sent = torch.randn(count).to(dtype)
        parts.append(kernels.pack_message(positions, sent, layout))
        expected[positions] += sent.double()
    messages = torch.cat(parts)
    counts = check_messages(messages.numel(), kernels.read_headers(messages, 3), layout, "bucket")
    out = torch.zeros(50, dtype=torch.float64)
    kernels.add_up(messages, counts, layout, dtype, out)
    assert counts == [count] * 3
    assert torch.equal(out, expected)


def test_messages_that_do_not_belong_together():
    layout = Layout(4, "float32")
    with pytest.raises(MessageError, match=r"topk/bucket0.*same TopK settings"):
        check_messages(2 * layout.words, [[4, 4], [4, 6]], layout, "topk/bucket0")
    with pytest.raises(MessageError):
        check_messages(2 * layout.words + 2, [[4, 4], [4, 4]], layout, "b")
    with pytest.raises(MessageError):
        check_messages(2 * layout.words, [[5, 4], [4, 4]], layout, "b")
    assert kernels.read_headers(torch.zeros(7, dtype=torch.int32), 2) == [[-1, -1]] * 2


def test_segments_of_a_bucket():
    bucket = Bucket(0, (TensorSlice(0, 0, 100), TensorSlice(1, 100, 30)), ())
    assert plan_segments(bucket, 0.1, per_tensor=False) == [Segment(0, 130, 13)]
    assert plan_segments(bucket, 0.1, per_tensor=True) == [Segment(0, 100, 10), Segment(100, 30, 3)]


def test_bucket_too_large_for_32_bits():
    check_bucket(Bucket(0, (TensorSlice(0, 0, 2**31 - 1),), ()), "w")
    with pytest.raises(ValueError, match=r"bucket of w has 2147483648 elements.*smaller bucket_bytes"):
        check_bucket(Bucket(0, (TensorSlice(0, 0, 2**31),), ()), "w")

"""Every collective by every dtype and layout, compared with what it must give, on two ranks."""

from __future__ import annotations

import horovod.torch as horovod
import pytest
import torch

from hvd_ext.torch.collectives import Collectives

pytestmark = pytest.mark.distributed
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
DTYPES = (*FLOATING, *WHOLE, torch.bool)
SHAPES = {"vector": (6,), "matrix": (4, 3), "empty": (0, 3), "scalar": ()}
LAYOUTS = ("contiguous", "transposed", "strided", "offset")


def made(shape, dtype, rank, layout):
    """A tensor of small whole numbers, exact in every dtype, in a layout."""
    numel = max(1, torch.Size(shape).numel())
    values = (torch.arange(numel, dtype=torch.int64) * 3 + 1 + rank) % 5
    tensor = values.to(dtype)[:torch.Size(shape).numel()].reshape(shape)
    if layout == "transposed" and len(shape) == 2:
        return tensor.t().contiguous().t()
    if layout == "strided" and len(shape):
        return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]
    if layout == "offset":
        return torch.cat([torch.zeros(1, dtype=dtype), tensor.reshape(-1)])[1:].view(shape)
    return tensor


def differs(result, expected, into=None):
    if result.dtype != expected.dtype or result.shape != expected.shape or not torch.equal(result, expected):
        return f"gave {result.dtype} {result.tolist()} for {expected.dtype} {expected.tolist()}"
    if into is not None and not torch.equal(into, expected):
        return f"left {into.tolist()} in place for {expected.tolist()}"
    return ""


# Each starts a collective and gives what waits for it and says what is wrong with the result.

def broadcast(collectives, name, shape, dtype, layout):
    tensor = made(shape, dtype, collectives.rank, layout)
    handle = collectives.broadcast_async_(tensor, 1, name)
    return lambda: differs(handle.wait(), made(shape, dtype, 1, "contiguous"), tensor)


def allgather(collectives, name, shape, dtype, layout):
    handle = collectives.allgather_async(made(shape, dtype, collectives.rank, layout), name)
    return lambda: differs(handle.wait(),
                           torch.cat([made(shape, dtype, rank, "contiguous") for rank in range(2)]))


def alltoall(collectives, name, shape, dtype, layout):
    splits = [shape[0] // 3, shape[0] - shape[0] // 3]
    handle = collectives.alltoall_async(made(shape, dtype, collectives.rank, layout), splits, name)
    expected = torch.cat([made(shape, dtype, rank, "contiguous").split(splits)[collectives.rank]
                          for rank in range(2)])
    return lambda: differs(handle.wait(), expected)


def summed(shape, dtype):
    both = [made(shape, dtype, rank, "contiguous") for rank in range(2)]
    return both[0] | both[1] if dtype == torch.bool else both[0] + both[1]


def allreduce(collectives, name, shape, dtype, layout):
    tensor = made(shape, dtype, collectives.rank, layout)
    handle = collectives.allreduce_async_(tensor, name, op=horovod.Sum)
    return lambda: differs(handle.wait(), summed(shape, dtype), tensor)


def grouped_allreduce(collectives, name, shape, dtype, layout):
    tensors = [made(shape, dtype, collectives.rank, layout) for _ in range(2)]
    handle = collectives.grouped_allreduce_async_(tensors, name, op=horovod.Sum)
    return lambda: "".join(differs(result, summed(shape, dtype), tensor)
                           for result, tensor in zip(handle.wait_all(), tensors, strict=True))


COLLECTIVES = {one.__name__: one for one in (broadcast, allgather, alltoall, allreduce, grouped_allreduce)}
NEED_AN_AXIS = ("allgather", "alltoall")


def all_cases(which):
    """How many cases of a collective there are, and what is wrong with each, on this rank."""
    collectives, started, found = Collectives(), {}, {}
    for name, shape in SHAPES.items():
        for dtype in DTYPES if shape or which not in NEED_AN_AXIS else ():
            for layout in LAYOUTS:
                case = f"{which} {name} {dtype} {layout}"
                started[case] = COLLECTIVES[which](collectives, case, shape, dtype, layout)
    for case, check in started.items():
        if wrong := check():
            found[case] = wrong
    return len(started), found


@pytest.mark.parametrize("which", COLLECTIVES)
def test_every_dtype_shape_and_layout(ranks, which):
    for count, found in ranks(2).run(all_cases, which):
        assert found == {}
        assert count == len(DTYPES) * len(LAYOUTS) * (3 if which in NEED_AN_AXIS else 4)

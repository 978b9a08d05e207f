"""What a compressed reply consists of: which weights go through it, and the k of each owner."""

from __future__ import annotations

from collections.abc import Sequence

from hvd_ext.reducers.buckets import DENSE
from hvd_ext.reducers.topk.config import keep_count
from hvd_ext.reducers.topk.plan import Segment
from hvd_ext.reducers.topk.wire import Layout, MessageError
from hvd_ext.sharding.settings import Server
from hvd_ext.sharding.shards import Shard

REPLY = "reply"  # the route of weights that come back compressed
WIDE = ("float32", "float64")
FLOATING = (*WIDE, "float16", "bfloat16")
FAILED = -1  # in the place of the number of entries: the owner's update failed


def route_weights(server: Server, name: str, shape: tuple[int, ...], dtype: str) -> str | None:
    """How a tensor's new weights travel: ``REPLY``, whole (``DENSE``), or None without a reply.

    Args:
        dtype: its name, such as "float32".
    """
    if server.downlink is None:
        return None
    if server.half:  # half precision has nothing to gain
        return REPLY if dtype in WIDE else DENSE
    return REPLY if dtype in FLOATING and server.downlink.should_compress(name, shape) else DENSE


def part_segments(part: Sequence[Shard], ratio: float, *, per_tensor: bool) -> list[Segment]:
    """What an owner chooses from: all that it has of a bucket, or each piece; offsets within its part."""
    if not part:
        return []
    if not per_tensor:
        numel = sum(piece.numel for piece in part)
        return [Segment(0, numel, keep_count(numel, ratio))]
    begin = part[0].offset
    return [Segment(piece.offset - begin, piece.numel, keep_count(piece.numel, ratio)) for piece in part]


def message_layout(segments: Sequence[Segment], values: str) -> Layout:
    """The message of an owner that chooses from ``segments``."""
    return Layout(sum(segment.k for segment in segments), values)


def check_headers(headers: Sequence[Sequence[int]], layouts: Sequence[Layout], what: str) -> list[int]:
    """The number of entries each owner sent, ``FAILED`` where its update failed.

    Raises:
        MessageError: the messages are not those of these layouts.
    """
    expected = [one.k for one in layouts]
    if any(k != wanted or not FAILED <= count <= k
           for (count, k), wanted in zip(headers, expected, strict=True)):
        raise MessageError(f"{what}: the owners' messages say (count, k) = {[tuple(h) for h in headers]}, "
                           f"expected k = {expected}. Give all ranks the same downlink=, also where its "
                           "ratio "
                           "is a function of the step")
    return [count for count, _ in headers]

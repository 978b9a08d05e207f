"""How many entries of what part of a bucket are kept."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_ext.reducers.buckets import Bucket
from hvd_ext.reducers.topk.config import keep_count
from hvd_ext.reducers.topk.wire import MAX_NUMEL


@dataclass(frozen=True)
class Segment:
    """A stretch of a flat bucket of which ``k`` entries are kept."""

    offset: int
    numel: int
    k: int


def plan_segments(bucket: Bucket, ratio: float, *, per_tensor: bool) -> list[Segment]:
    """What is chosen from at this ratio: the bucket, or each of its tensors."""
    if not per_tensor:
        return [Segment(0, bucket.numel, keep_count(bucket.numel, ratio))]
    return [Segment(slot.offset, slot.numel, keep_count(slot.numel, ratio))
            for slot in bucket.slots]


def check_bucket(bucket: Bucket, name: str) -> None:
    """Refuse a bucket whose positions do not fit the 32 bits of the wire format.

    Raises:
        ValueError: it has more than ``2**31 - 1`` elements.
    """
    if bucket.numel > MAX_NUMEL:
        raise ValueError(f"the bucket of {name} has {bucket.numel} elements, TopK's limit is "
                         f"{MAX_NUMEL}; exclude that tensor or pass a smaller bucket_bytes")

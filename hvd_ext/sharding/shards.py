"""Which elements of which tensor each rank updates, and where they lie in a message.

Where the update is elementwise a bucket is cut into one slice a rank, nearly equal ones; where it is not,
each tensor has one owner. In either case what rank r owns of a bucket is one contiguous part of the
message, so that one alltoall brings gradients to their owners and one allgather brings weights back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvd_ext.reducers.buckets import Bucket, BucketKey, slice_sizes

ALIGNED = 128  # twice the widest vector of 16-bit numbers (AVX-512), which torch takes at a time


@dataclass(frozen=True)
class Shard:
    """Elements ``start`` to ``stop`` of the flattened tensor ``index``, at ``offset`` of the message."""

    index: int
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        """How many elements they are."""
        return self.stop - self.start

    def slice_of(self, flat: Any) -> Any:
        """The piece's elements in a flat message."""
        return flat[self.offset : self.offset + self.numel]


@dataclass(frozen=True)
class ShardedBucket:
    """A bucket in the order of its owners.

    Attributes:
        index: its number.
        kind: what its tensors have in common.
        parts: the pieces of each rank, by rank; a rank's follow one another without a gap.
    """

    index: int
    kind: BucketKey
    parts: tuple[tuple[Shard, ...], ...]

    @property
    def splits(self) -> list[int]:
        """Elements that each rank owns, by rank."""
        return [sum(piece.numel for piece in part) for part in self.parts]

    @property
    def numel(self) -> int:
        """Elements of the whole message."""
        return sum(self.splits)

    @property
    def pieces(self) -> list[Shard]:
        """All pieces, in their order in the message."""
        return [piece for part in self.parts for piece in part]

    def renumbered(self, index: int, base: int) -> ShardedBucket:
        """The same under another number, of tensors that are numbered from ``base``."""
        parts = [[replace(piece, index=piece.index + base) for piece in part] for part in self.parts]
        return _laid_out(index, self.kind, parts)

    def without_tensors(self, left_out: Collection[int]) -> ShardedBucket:
        """The message without some tensors."""
        kept = [[piece for piece in part if piece.index not in left_out] for part in self.parts]
        return _laid_out(self.index, self.kind, kept)


def cut_evenly(bucket: Bucket, ranks: int, units: Mapping[int, int] | None = None) -> ShardedBucket:
    """A bucket whose elements are dealt to the ranks in slices of nearly equal size.

    A tensor is cut at multiples of ``ALIGNED`` elements only: an update of a piece then goes through
    the processor's vector units as that of the whole tensor does, and gives the same bits.

    Args:
        units: for tensors, by number, that are cut at multiples of something else, such as their rows.
    """
    units = units or {}
    parts: list[list[Shard]] = []
    begin = ideal = 0
    for size in slice_sizes(bucket.numel, ranks):
        ideal += size
        end = _aligned_cut(bucket, ideal, units)
        part = []
        for slot in bucket.slots:
            start, stop = max(begin, slot.offset), min(end, slot.offset + slot.numel)
            if start < stop:
                part.append(Shard(slot.index, start - slot.offset, stop - slot.offset, 0))
        parts.append(part)
        begin = end
    return _laid_out(bucket.index, bucket.kind, parts)


def _aligned_cut(bucket: Bucket, position: int, units: Mapping[int, int]) -> int:
    """The place near ``position`` at which a bucket may be cut."""
    for slot in bucket.slots:
        inside, unit = position - slot.offset, units.get(slot.index, ALIGNED)
        if 0 < inside < slot.numel:
            return slot.offset + min(slot.numel, unit * round(inside / unit))
    return position


def by_owner(bucket: Bucket, owners: Mapping[int, int], ranks: int) -> ShardedBucket:
    """A bucket whose tensors stay whole.

    Args:
        owners: the owner of each tensor, by its number.
    """
    parts: list[list[Shard]] = [[] for _ in range(ranks)]
    for slot in bucket.slots:
        parts[owners[slot.index]].append(Shard(slot.index, 0, slot.numel, 0))
    return _laid_out(bucket.index, bucket.kind, parts)


def _laid_out(index: int, kind: BucketKey, parts: Sequence[Sequence[Shard]]) -> ShardedBucket:
    at, result = 0, []
    for part in parts:
        placed = []
        for piece in part:
            placed.append(Shard(piece.index, piece.start, piece.stop, at))
            at += piece.numel
        result.append(tuple(placed))
    return ShardedBucket(index, kind, tuple(result))


def elements_by_rank(messages: Sequence[ShardedBucket], ranks: int) -> list[int]:
    """Elements that each rank owns of all messages."""
    return [sum(message.splits[rank] for message in messages) for rank in range(ranks)]

"""Which gradient goes into which flat bucket, and at which offset; the same on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DEFAULT_BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class TensorSpec:
    """What a plan needs to know of one parameter's gradient.

    ``kind`` holds whatever must be alike within a bucket: dtype, device type, parameter group.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    kind: tuple[str, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


@dataclass(frozen=True)
class Slot:
    """One tensor's place in a bucket, ``flat[offset:offset + numel]``; ``index`` numbers it in the input."""

    index: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel as one flat message."""

    index: int
    slots: tuple[Slot, ...]
    kind: tuple[str, ...]

    @property
    def numel(self) -> int:
        """Elements of the flat bucket."""
        return sum(slot.numel for slot in self.slots)


def plan_buckets(tensors: Sequence[TensorSpec], *, bucket_bytes: int = DEFAULT_BUCKET_BYTES,
                 groups: Sequence[Iterable[int]] | None = None) -> list[Bucket]:
    """Cut tensors into buckets, last tensor first, as the backward pass yields their gradients.

    A bucket holds one kind only and at most ``bucket_bytes``, or a single larger tensor. With
    ``groups`` (lists of tensor numbers) each group is a bucket of its own, whatever its size.
    """
    plan: list[Bucket] = []
    grouped = [list(group) for group in groups] if groups is not None else None
    if grouped is None:
        batches = [list(range(len(tensors)))]
        limit: float = bucket_bytes
    else:
        taken = {index for group in grouped for index in group}
        batches = grouped + [[index] for index in range(len(tensors)) if index not in taken]
        limit = float("inf")
    for batch in batches:
        filling: dict[tuple[str, ...], list[Slot]] = {}
        for index in sorted(batch, reverse=True):
            spec = tensors[index]
            slots = filling.setdefault(spec.kind, [])
            used = sum(slot.numel for slot in slots)
            if slots and (used + spec.numel) * spec.itemsize > limit:
                plan.append(Bucket(len(plan), tuple(slots), spec.kind))
                slots = filling[spec.kind] = []
                used = 0
            slots.append(Slot(index, used, spec.numel))
        for kind, slots in filling.items():
            plan.append(Bucket(len(plan), tuple(slots), kind))
    return plan


def digest(*parts: object) -> int:
    """A 62-bit number that ranks compare to see that they planned alike."""
    text = "\n".join(repr(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def differences(mine: Sequence[str], others: Sequence[Sequence[str]], limit: int = 4) -> list[str]:
    """Lines that say where ranks' descriptions differ from rank 0's, a few for each rank."""
    first = others[0]
    lines = []
    for rank, theirs in enumerate(others):
        if list(theirs) == list(first):
            continue
        missing = [item for item in first if item not in set(theirs)]
        extra = [item for item in theirs if item not in set(first)]
        said = [f"has not {item}" for item in missing[:limit]]
        said += [f"has {item}" for item in extra[:limit]]
        lines.append(f"rank {rank}: " + "; ".join(said or ["has the same in another order"]))
    return lines

"""Which gradient goes into which flat bucket, and at which offset; the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

DEFAULT_BUCKET_BYTES = 25 * 2**20
MOST_BYTES = 2**31 - 1  # of one message
DENSE = "dense"  # the route of tensors that a compression sends whole


@dataclass(frozen=True, order=True)
class BucketKey:
    """What all tensors of a bucket have in common. A field that does not separate them is None.

    Attributes:
        dtype: its name, such as "float32".
        device: where the tensors are, such as "cuda".
        group: the number of their parameter group.
        route: how they travel, such as "topk" or "dense".
        owner: the rank that updates them.
    """

    dtype: str
    device: str | None = None
    group: int | None = None
    route: str | None = None
    owner: int | None = None

    def __str__(self) -> str:
        parts = [self.dtype]
        parts += [] if self.device is None else [f"on {self.device}"]
        parts += [] if self.group is None else [f"in parameter group {self.group}"]
        parts += [] if self.route is None else [f"sent {self.route}"]
        parts += [] if self.owner is None else [f"updated by rank {self.owner}"]
        return " ".join(parts)


@dataclass(frozen=True)
class TensorSpec:
    """What a plan needs to know about one parameter's gradient."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    kind: BucketKey

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name}{list(self.shape)} {self.kind}"


@dataclass(frozen=True)
class TensorSlice:
    """One tensor's place in a bucket; ``index`` is its number among the tensors planned for."""

    index: int
    offset: int
    numel: int

    def slice_of(self, flat: Any) -> Any:
        """The tensor's elements in a flat bucket, ``flat[offset:offset + numel]``."""
        return flat[self.offset : self.offset + self.numel]


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel as one flat message."""

    index: int
    slots: tuple[TensorSlice, ...]
    kind: BucketKey

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
    if groups is None:
        batches = [list(range(len(tensors)))]
        limit: float = bucket_bytes
    else:
        batches = [list(group) for group in groups]
        taken = {index for batch in batches for index in batch}
        batches += [[index] for index in range(len(tensors)) if index not in taken]
        limit = float("inf")
    for batch in batches:
        filling: dict[BucketKey, list[TensorSlice]] = {}
        for index in sorted(batch, reverse=True):
            spec = tensors[index]
            slots = filling.setdefault(spec.kind, [])
            used = sum(slot.numel for slot in slots)
            if slots and (used + spec.numel) * spec.itemsize > limit:
                plan.append(Bucket(len(plan), tuple(slots), spec.kind))
                slots = filling[spec.kind] = []
                used = 0
            slots.append(TensorSlice(index, used, spec.numel))
        for kind, slots in filling.items():
            plan.append(Bucket(len(plan), tuple(slots), kind))
    return plan


def check_message(bucket: Bucket, tensors: Sequence[TensorSpec], what: str) -> None:
    """Refuse a bucket that MPI cannot count: its lengths are 32-bit numbers.

    Raises:
        ValueError: it holds more than 2 GiB; names its largest tensor.
    """
    largest = max((tensors[slot.index] for slot in bucket.slots), key=lambda spec: spec.numel)
    size = bucket.numel * largest.itemsize
    if size > MOST_BYTES:
        raise ValueError(
            f"{what} would send {size} bytes in one message, of which {largest.name} is "
            f"{largest.numel * largest.itemsize}; MPI takes at most {MOST_BYTES}. Make smaller groups, "
            "split the parameter, or train it with plain reduction")


def slice_sizes(count: int, parts: int) -> list[int]:
    """Cut ``count`` items into ``parts`` contiguous slices, as equal as possible, larger ones first."""
    base, rest = divmod(count, parts)
    return [base + (part < rest) for part in range(parts)]


def split_groups(groups: int | Sequence[Any] | None, tensors: Sequence[Any], *,
                 key: Callable[[Any], Hashable] = id) -> list[list[int]] | None:
    """Horovod's ``groups=`` as lists of tensor numbers.

    Args:
        groups: a number of groups of consecutive tensors (the first ones are larger where they do
            not divide evenly, as in Horovod), or lists of tensors. None and 0 mean no groups.
        tensors: all tensors, in the same order on every rank.
        key: what identifies a tensor.

    Returns:
        The groups, without empty ones; tensors in no group are left out. None for no groups.
    """
    if groups is None or (isinstance(groups, int) and groups == 0):
        return None
    if isinstance(groups, int):
        start, result = 0, []
        for size in slice_sizes(len(tensors), max(1, min(groups, len(tensors)))):
            result.append(list(range(start, start + size)))
            start += size
        return [group for group in result if group]
    numbers = {key(tensor): number for number, tensor in enumerate(tensors)}
    found = [[numbers[key(one)] for one in _group_members(group) if key(one) in numbers]
             for group in groups]
    return [group for group in found if group]


def check_groups(groups: Any, *, member: type | tuple[type, ...], what: str,
                 key: Callable[[Any], Hashable] = id) -> None:
    """Refuse a ``groups=`` that is neither a number nor lists of ``member`` objects.

    Args:
        what: the name of ``member`` for messages, such as "torch.Tensor".

    Raises:
        ValueError: it is neither, or a tensor is in two groups.
    """
    if groups is None or (isinstance(groups, int) and not isinstance(groups, bool) and groups >= 0):
        return
    if not isinstance(groups, (list, tuple)):
        raise ValueError(f"groups should be a non-negative integer or a list of list of {what}, "
                         f"got {groups!r}")
    members = [one for group in groups for one in _group_members(group)]
    if not all(isinstance(one, member) for one in members):
        raise ValueError(f"groups must consist of {what}.")
    if len({key(one) for one in members}) < len(members):
        raise ValueError("A parameter can only appear once in groups.")


def _group_members(group: Any) -> Sequence[Any]:
    """The tensors of a group; a tensor by itself is a group of one."""
    return group if isinstance(group, (list, tuple)) else [group]

"""Parameters that are frozen in a step: what is kept of them waits while the rest goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import horovod.torch as horovod
import torch

from hvd_ext.consistency import checksum
from hvd_ext.consistency.fingerprint import digest_parts, mismatch_message
from hvd_ext.reducers.buckets import Bucket, TensorSlice, slice_sizes
from hvd_ext.state import PARAMETERS, SHARD, Part
from hvd_ext.torch.collectives import Handle

if TYPE_CHECKING:
    from hvd_ext.torch.reducers.base import Reducer
    from hvd_ext.torch.reducers.buckets import BucketReducer


def frozen_slots(reducer: BucketReducer, bucket: Bucket) -> list[TensorSlice]:
    """The places of a bucket's frozen parameters."""
    if not reducer.frozen:
        return []
    return [slot for slot in bucket.slots if reducer.entries[slot.index] in reducer.frozen]


def frozen_slices(reducer: BucketReducer, bucket: Bucket) -> list[slice]:
    """Where this rank's slice of a bucket, one of M as equal as possible, has frozen parameters."""
    sizes, rank = slice_sizes(bucket.numel, reducer.collectives.size), reducer.collectives.rank
    low, high = sum(sizes[:rank]), sum(sizes[:rank + 1])
    return cut_slots(frozen_slots(reducer, bucket), low, high)


def cut_slots(slots: list[TensorSlice], low: int, high: int) -> list[slice]:
    """What lies of ``slots`` between two places of a bucket, counted from the first of them."""
    cut = [(max(slot.offset, low), min(slot.offset + slot.numel, high)) for slot in slots]
    return [slice(begin - low, end - low) for begin, end in cut if begin < end]


def hold_frozen(reducer: BucketReducer) -> None:
    """Put what is kept of frozen parameters into what takes its place when the step is taken.

    A tensor of which nothing is kept was zeros, and gradients of zero have left it so.
    """
    for part in reducer.STATE if reducer.frozen else ():
        kept = getattr(reducer, part.attribute)
        scale = reducer.state_rescale() if part.scaled else 1.0
        for index, draft in reducer.staged_tensors(part.name).items():
            if index in kept:
                for place in _places_of_frozen(reducer, part, reducer.buckets[index]):
                    torch.mul(kept[index][place], scale, out=draft[place])


def _places_of_frozen(reducer: BucketReducer, part: Part, bucket: Bucket) -> list[slice]:
    if part.scope == SHARD:
        return frozen_slices(reducer, bucket)
    return cut_slots(frozen_slots(reducer, bucket), 0, bucket.numel) if part.layout == PARAMETERS else []


def frozen_token(parameter: torch.Tensor) -> torch.Tensor:
    """What travels under a frozen parameter's name in place of its gradient: one zero.

    It has one axis more than the gradient: where a rank trains the parameter, Horovod refuses both.
    """
    return torch.zeros((1,) * (parameter.dim() + 1), dtype=parameter.dtype, device=parameter.device)


def ask_frozen(reducer: Reducer, name: str) -> Handle:
    """Start to compare what is frozen on the ranks, where nothing else that they exchange would show it."""
    total = torch.from_numpy(checksum.encode_checksum(digest_parts(reducer.frozen_lines())))
    return reducer.collectives.allreduce_async_(total, name, op=horovod.Sum, kind="agreement")


def check_frozen(reducer: Reducer, asked: Handle) -> None:
    """Wait for what :func:`ask_frozen` has started.

    Raises:
        ValueError: on every rank, when they do not have the same parameters frozen.
    """
    if not checksum.all_equal(asked.wait().numpy()):
        lines = reducer.collectives.allgather_object(reducer.frozen_lines(), checksum.DIFFER)
        raise reducer.collectives.errors.raise_together(mismatch_message(
            "the ranks do not train the same parameters", lines,
            "Set requires_grad alike on all ranks, before the same step"))

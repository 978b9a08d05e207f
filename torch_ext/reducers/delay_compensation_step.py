"""What a step of delay compensation knows of its exchange, bucket by bucket."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from hvd_ext.reducers.delay_compensation.slices import VirtualWorker
from hvd_ext.torch.async_d2h import AsyncHostCopy
from hvd_ext.torch.collectives import Handle

ABSENT = -1.0  # in place of a squared norm: this rank had no such micro-batch


class InFlightBucket(NamedTuple):
    """A bucket on its way: the alltoall, None on a single rank, and its squared norm, 0-D."""

    handle: Handle | None
    square: AsyncHostCopy


@dataclass
class StepState:
    """How far a step's exchange is, and what all its buckets have in common, whenever each goes back."""

    order: list[VirtualWorker] | None = None  # None until it is known
    good: bool | None = None  # all gradients are finite; None until it is known
    rates: dict[int, float] = field(default_factory=dict)  # by bucket
    loss_scale: float | None = None

"""In which order delay compensation applies the virtual workers' gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class VirtualWorker:
    """One virtual worker of a step: the gradient of ``rank``'s backward pass number ``part``.

    ``step_square`` is the squared length of the step it would make, ``sum_groups lr^2 |g|^2``.
    """

    rank: int
    part: int
    step_square: float


def all_usable(workers: Sequence[VirtualWorker]) -> bool:
    """Whether all gradients are finite and small enough to be squared."""
    return all(math.isfinite(worker.step_square) for worker in workers)


def application_order(workers: Sequence[VirtualWorker], order: str) -> list[VirtualWorker]:
    """The workers in the order in which their gradients are applied (supplement, section H)."""
    if order == "norm":
        return sorted(workers, key=lambda w: (w.step_square, w.rank, w.part))
    return sorted(workers, key=lambda w: (w.rank, w.part))

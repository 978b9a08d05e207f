"""The settings of TopK with error feedback, checked when they are made."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from math import prod
from typing import ClassVar

from hvd_ext import checks
from hvd_ext.reducers.filters import Exclude, checked_exclude, is_excluded
from hvd_ext.reducers.topk.wire import VALUE_BYTES

EXCHANGES = ("allgather", "sparse_allreduce", "auto")
HOROVOD_FUSION_BYTES = 128 * 2**20  # what Horovod fuses unless HOROVOD_FUSION_THRESHOLD says else


@dataclass(frozen=True)
class TopK:
    """Send the ``k = max(1, round(ratio * n))`` largest entries, keep the rest for later.

    Algorithm 1 of SPARS-AMS, lines 7 to 9: ``a = g + e``, ``s = TopK(a, k)``, ``e = a - s``.

    Args:
        ratio: kept fraction in (0, 1], or a function of the step (0, 1, 2, ...) that gives it.
        selection: "exact", or "sampled": entries above a threshold estimated from a sample, between
            ``(1 - tolerance) * k`` and ``k`` of them.
        error_feedback: keep what was not sent and add it to the next gradient. False is for
            comparison: what is not sent is lost.
        exchange: how entries come together. "allgather": every rank receives the entries of all others,
            which grows with the ranks. "sparse_allreduce": entries go to the owner of their place, which
            sends the about k largest of the means back and keeps the rest as a residual of its own;
            what a rank sends does not grow with the ranks. "auto": whichever is quicker for the number of
            ranks, by the figures of ``hvd-ext plan`` at 10 Gbit/s.
        values: type of the values on the wire: "float32", "float16", "bfloat16" or "float64". What
            rounding to it takes away stays in the residual.
        per_tensor: choose k entries of each tensor instead of k of each bucket.
        bucket_bytes: bytes of gradient that are selected from and sent together; Horovod's fusion
            threshold (HOROVOD_FUSION_THRESHOLD, 128 MiB) unless given.
        exclude: tensors to send whole: names, patterns ("*.bias"), or a function of (name, shape).
        min_size: a tensor with fewer elements is sent whole.
        tolerance: how far below k a sampled selection may stay, as a fraction of k.
        seed: of the sample.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its limits.
    """

    slot: ClassVar[str] = "compression"
    label: ClassVar[str] = "topk"

    ratio: float | Callable[[int], float] = 0.01
    _: KW_ONLY
    selection: str = "exact"
    exchange: str = "allgather"
    error_feedback: bool = True
    values: str = "float32"
    per_tensor: bool = False
    bucket_bytes: int = field(default_factory=lambda: fusion_threshold())
    exclude: Exclude | None = None
    min_size: int = 1024
    tolerance: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.ratio):
            checked_ratio(self.ratio)
        checks.check_choice("selection", self.selection, ("exact", "sampled"))
        checks.check_choice("exchange", self.exchange, EXCHANGES)
        checks.check_bool("error_feedback", self.error_feedback)
        checks.check_choice("values", self.values, VALUE_BYTES)
        checks.check_bool("per_tensor", self.per_tensor)
        checks.check_int("bucket_bytes", self.bucket_bytes, low=1,
                         hint="it is a number of bytes; 64 MiB is bucket_bytes=64 * 2**20")
        checks.check_int("min_size", self.min_size, low=0, hint="min_size=0 compresses every tensor")
        checks.check_float("tolerance", self.tolerance, low=0.0, high=1.0, open_high=True)
        checks.check_int("seed", self.seed, low=0)
        object.__setattr__(self, "exclude", checked_exclude(self.exclude))

    def should_compress(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is compressed; otherwise it is sent whole."""
        small = prod(shape) < max(1, self.min_size)
        return not (small or is_excluded(self.exclude, name, shape))

    def ratio_at(self, step: int) -> float:
        """The kept fraction at a step, checked."""
        if callable(self.ratio):
            return checked_ratio(self.ratio(step), f"ratio({step})")
        return float(self.ratio)


def fusion_threshold() -> int:
    """Horovod's fusion threshold in bytes; 1, a bucket for each tensor, where fusion is off.

    Raises:
        ValueError: HOROVOD_FUSION_THRESHOLD is no whole number.
    """
    given = os.environ.get("HOROVOD_FUSION_THRESHOLD", "").strip()
    if not given:
        return HOROVOD_FUSION_BYTES
    if not given.isdecimal():
        raise ValueError(f"HOROVOD_FUSION_THRESHOLD must be a whole number of bytes, got {given!r}; "
                         "correct it, or pass bucket_bytes=")
    return max(1, int(given))


def checked_ratio(ratio: float, name: str = "ratio") -> float:
    """``ratio`` when it is in (0, 1].

    Raises:
        TypeError, ValueError: it is not.
    """
    return checks.check_float(name, ratio, low=0.0, high=1.0, open_low=True,
                              hint="for 1 % of the entries pass ratio=0.01")


def keep_count(numel: int, ratio: float) -> int:
    """k = max(1, round(ratio * n)), and 0 of 0."""
    return min(numel, max(1, round(ratio * numel)))


def warm_up(ratio: float, steps: int, start: float = 0.25) -> Callable[[int], float]:
    """A ratio that falls from ``start`` to ``ratio`` by the same factor each step, then stays.

    Raises:
        TypeError, ValueError: a ratio outside (0, 1], fewer than one step.
    """
    checked_ratio(ratio)
    checked_ratio(start, "start")
    checks.check_int("steps", steps, low=1)

    def at(step: int) -> float:
        done = min(1.0, step / steps)
        return float(start * (ratio / start) ** done)

    return at

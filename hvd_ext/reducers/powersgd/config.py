"""The settings of PowerSGD, checked on construction."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from math import prod
from typing import ClassVar

from hvd_ext import checks
from hvd_ext.reducers.buckets import DEFAULT_BUCKET_BYTES
from hvd_ext.reducers.filters import Exclude, checked_exclude, is_excluded


@dataclass(frozen=True)
class PowerSGD:
    """Send a rank-r approximation of every gradient matrix, keep the rest for later steps.

    Algorithms 1 and 2 of Vogels et al. (arXiv 1905.13727). Of a gradient matrix ``D = g + e``
    (n x m) only ``P = D Q`` (n x r) and ``D^T P`` (m x r) travel, each as the mean over the ranks
    by one allreduce, so that the bytes do not grow with the number of ranks. A tensor is a matrix
    whose rows are its output axis and whose columns are all other axes.

    Args:
        rank: r, at least 1. The paper uses 1 to 4; more is closer to the gradient and more bytes.
        warm_start: begin the power iteration at the last step's Q, as in the paper; with False at
            random numbers that all ranks draw anew at every step.
        error_feedback: keep what the approximation lost and add it to the next gradient. False is
            for comparison: what is not sent is lost.
        min_compression: send a tensor whole unless ``(n + m) r`` is smaller than its elements by
            this factor; vectors are always sent whole.
        bucket_bytes: bytes of gradient that travel together.
        exclude: tensors to send whole: names, patterns ("*.bias"), or a function of (name, shape).
        seed: of the first Q.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its limits.
    """

    slot: ClassVar[str] = "compression"
    label: ClassVar[str] = "powersgd"

    rank: int = 4
    _: KW_ONLY
    warm_start: bool = True
    error_feedback: bool = True
    min_compression: float = 2.0
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    exclude: Exclude | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks.check_int("rank", self.rank, low=1, hint="1 to 4 are usual; more costs more bytes")
        checks.check_bool("warm_start", self.warm_start)
        checks.check_bool("error_feedback", self.error_feedback)
        checks.check_float("min_compression", self.min_compression, low=1.0,
                           hint="2 sends a tensor whole unless compression halves its bytes")
        checks.check_int("bucket_bytes", self.bucket_bytes, low=1,
                         hint="it is a number of bytes; 64 MiB is bucket_bytes=64 * 2**20")
        checks.check_int("seed", self.seed, low=0)
        object.__setattr__(self, "exclude", checked_exclude(self.exclude))

    def should_compress(self, name: str, shape: tuple[int, ...], output_axis: int = 0) -> bool:
        """Whether a tensor is compressed; otherwise it is sent whole."""
        if len(shape) < 2 or 0 in shape or is_excluded(self.exclude, name, shape):
            return False
        rows = shape[output_axis]
        columns = prod(shape) // rows
        return (rows + columns) * self.rank * self.min_compression <= rows * columns

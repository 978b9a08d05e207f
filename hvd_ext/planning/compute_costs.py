"""What a rank computes for an exchange, beside forward and backward pass: nanoseconds an element."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from hvd_ext import checks


@dataclass(frozen=True)
class ComputeCosts:
    """Nanoseconds an element of float32; the defaults are about what one CPU core takes.

    Args:
        pass_ns: one pass of an elementwise operation: a copy into a bucket, an addition, a division.
        cast_ns: to half precision, or back.
        select_ns: TopK: compensation, selection and packing of what is sent.
        scatter_ns: an entry of TopK that was received and is added up.
        recursion_ns: an element of one worker in the recursion of delay compensation.
        product_ns: an element in one product of PowerSGD, for each rank r of the approximation.
        compensate_ns: the compensation of ``overlap=``.
        update_ns: the optimizer's update.

    Raises:
        TypeError, ValueError: no number, or one below 0.
    """

    pass_ns: float = 0.6
    cast_ns: float = 0.4
    select_ns: float = 5.5
    scatter_ns: float = 5.0
    recursion_ns: float = 2.4
    product_ns: float = 1.0
    compensate_ns: float = 3.5
    update_ns: float = 0.6

    def __post_init__(self) -> None:
        for one in fields(self):
            checks.check_float(one.name, getattr(self, one.name), low=0.0)

    @classmethod
    def no_compute(cls) -> ComputeCosts:
        """Work that takes no time: what is left is the network."""
        return cls(**{one.name: 0.0 for one in fields(cls)})

    @classmethod
    def of_memory(cls, gigabytes_per_second: float) -> ComputeCosts:
        """An estimate for a device that is limited by its memory, such as a GPU: bytes over bandwidth.

        A pass reads one or two arrays and writes one (10 bytes an element on average); the other figures
        are such passes: a selection 8, an entry scattered 64 bytes (a sector read and one written),
        a worker of the recursion 3, a product of PowerSGD for all of its rank together 1, late's
        compensation 4.
        """
        bandwidth = checks.check_float("memory bandwidth", gigabytes_per_second, low=0.0, open_low=True)
        one = 10 / bandwidth
        return cls(pass_ns=one, cast_ns=0.6 * one, select_ns=8 * one, scatter_ns=64 / bandwidth,
                   recursion_ns=3 * one, product_ns=one / 4, compensate_ns=4 * one, update_ns=one)

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

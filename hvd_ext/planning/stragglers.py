"""Ranks whose compute takes longer than it should, by a distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_ext import checks

KINDS = ("none", "lognormal", "exponential")


@dataclass(frozen=True)
class Stragglers:
    """By what factor the compute of a rank in a step is longer; drawn anew for each of them.

    Args:
        kind: "none": 1. "lognormal": ``exp(amount Z)`` with Z normal, median 1. "exponential":
            ``1 + amount E`` with E exponential of mean 1: a long tail.
        amount: 0 is none.

    Raises:
        TypeError, ValueError: no such kind, or an amount outside [0, 10].
    """

    kind: str = "none"
    amount: float = 0.0

    def __post_init__(self) -> None:
        checks.check_choice("straggler", self.kind, KINDS)
        checks.check_float("straggler's amount", self.amount, low=0.0, high=10.0,
                           hint="10 % is lognormal:0.1")

    @classmethod
    def parse_text(cls, text: str) -> Stragglers:
        """From "none", "lognormal:0.1" or "exponential:0.05".

        Raises:
            ValueError: it is none of them.
        """
        kind, _, amount = text.partition(":")
        try:
            value = float(amount) if amount or kind != "none" else 0.0
        except ValueError:
            raise ValueError(f"straggler must be none, lognormal:AMOUNT or exponential:AMOUNT, got {text!r}; "
                             "a spread of 10 % is lognormal:0.1") from None
        return cls(kind, value)

    def draw_factors(self, generator: np.random.Generator, steps: int, ranks: int) -> npt.NDArray[Any]:
        """Factors (steps, ranks)."""
        if self.kind == "lognormal":
            return np.exp(self.amount * generator.standard_normal((steps, ranks)))
        if self.kind == "exponential":
            return 1.0 + self.amount * generator.standard_exponential((steps, ranks))
        return np.ones((steps, ranks))

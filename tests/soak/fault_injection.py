"""A rank that ends or stops itself at a chosen moment of a chosen step, to the single function call."""

from __future__ import annotations

import os
import sys
from typing import Any

EARLY = 4000  # calls, about, of a step that has no like before it


class Striker:
    """Counts the function calls of a step and strikes at a share of them.

    Args:
        step: at which it strikes; how many calls it has is taken from the step ``period`` before.
        share: of the step's calls, in [0, 1): 0.99 is near its end, where a checkpoint is written.
        signal: what this process sends itself.
    """

    def __init__(self, step: int, share: float, signal: int, period: int) -> None:
        self.step, self.share, self.signal, self.period = step, share, signal, period
        self.calls = 0
        self.total = EARLY
        self.at: float = float("inf")

    def before_step(self, number: int) -> None:
        """A step begins, and with it the end of the one before."""
        if number == self.step - self.period:
            self.calls = 0
            sys.setprofile(self._count)
        elif number == self.step - self.period + 1:
            sys.setprofile(None)
            self.total = self.calls or EARLY
        if number == self.step:
            self.calls, self.at = 0, self.share * self.total
            sys.setprofile(self._count)  # on into the next step, where this one has fewer calls

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        self.calls += event in ("call", "c_call")
        if self.calls >= self.at:
            self.at = float("inf")
            os.kill(os.getpid(), self.signal)

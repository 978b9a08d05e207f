"""Summary of the runs of several seeds: a mean hides that one of them diverged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

DIVERGED = 50.0  # test error in percent above which a run on the digits counts as diverged; guessing gives 90


@dataclass(frozen=True)
class Summary:
    """Median, range and number of diverged runs.

    Args:
        median: of all runs, diverged ones included.
        low: the smallest value.
        high: the largest value.
        runs: how many there are.
        diverged: how many of them are above the limit or not finite.
    """

    median: float
    low: float
    high: float
    runs: int
    diverged: int

    def __str__(self) -> str:
        """``4.4 (3.9 to 78.3; 1 of 5 diverged)``."""
        return self.describe(1)

    def describe(self, decimals: int) -> str:
        """The same with so many decimals."""
        ending = f"; {self.diverged} of {self.runs} diverged" if self.diverged else ""
        low, high = f"{self.low:.{decimals}f}", f"{self.high:.{decimals}f}"
        return f"{self.median:.{decimals}f} ({low} to {high}{ending})"


def summarize(values: Sequence[float], limit: float = DIVERGED) -> Summary:
    """Summarise one value for each seed.

    Args:
        values: for instance test errors in percent.
        limit: a larger value counts as diverged.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("there is no run to summarise")
    ordered = sorted(math.inf if math.isnan(value) else value for value in values)
    return Summary(median(ordered), ordered[0], ordered[-1], len(ordered),
                   sum(one > limit for one in ordered))

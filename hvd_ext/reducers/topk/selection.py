"""How the largest entries are found without sorting them all: a threshold guessed from a sample.

With S of n magnitudes drawn at random, the number among them that belongs to the k largest is
about r = S k / n, give or take sqrt(r). The (r + z sqrt(r))-th largest of the sample is therefore a
threshold that leaves at least k candidates but for a chance of z standard deviations, and only
about k of them: what remains is to choose k of these few.
"""

from __future__ import annotations

import math

SAMPLE = 65_536
MIN_SAMPLED_NUMEL = 2 * SAMPLE
MARGINS = {"exact": (3.0, 12.0), "sampled": (0.0, 6.0)}


def sample_ranks(numel: int, k: int, selection: str) -> list[int]:
    """Which of the sample's magnitudes (1 is the largest) to try as threshold, one after another.

    Empty when looking at all entries is as good.
    """
    if numel <= MIN_SAMPLED_NUMEL or 4 * k >= numel:
        return []
    expected = SAMPLE * k / numel
    ranks = [math.ceil(expected + z * math.sqrt(expected)) + (1 if z else 0)
             for z in MARGINS[selection]]
    return [max(1, rank) for rank in ranks if rank < SAMPLE]


def has_enough_candidates(candidates: int, k: int, selection: str, tolerance: float) -> bool:
    """Whether so many candidates will do, or another threshold must be tried."""
    least = k if selection == "exact" else math.ceil((1.0 - tolerance) * k)
    return candidates >= least

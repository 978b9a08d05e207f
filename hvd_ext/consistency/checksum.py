"""How ranks compare a fingerprint with one small sum, whatever their settings are.

The sum is the same collective on every rank, under one name: ranks that were given different
extensions meet in it. A rank that has left by ``hvd.join()`` adds zeros and counts for nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NAME = "hvd_ext/consistency"
DIFFER = "hvd_ext/mismatch"
LIMB_BITS = 20  # the sum of the squares of 2^20 ranks' limbs still fits 63 bits
LIMBS = 3
WORDS = 2 + 2 * LIMBS

Words = npt.NDArray[np.int64]


def encode_checksum(number: int, *, asks: bool = False) -> Words:
    """A rank's contribution: 1, each limb of ``number`` and its square, and ``asks``; (8,) int64."""
    limbs = [(number >> (LIMB_BITS * place)) & (2**LIMB_BITS - 1) for place in range(LIMBS)]
    return np.array([1, *limbs, *(limb * limb for limb in limbs), asks], np.int64)


def all_equal(total: Words) -> bool:
    """Whether all ranks that took part in the sum gave the same number.

    n sum x^2 = (sum x)^2 holds only where all x are equal (Cauchy-Schwarz).
    """
    count = int(total[0])
    return all(count * int(total[1 + LIMBS + place]) == int(total[1 + place]) ** 2
               for place in range(LIMBS))


def is_requested(total: Words, ranks: int) -> bool:
    """Whether a rank asks for what only all ``ranks`` together can do, and all are there."""
    return bool(total[-1]) and int(total[0]) == ranks

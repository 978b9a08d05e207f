"""TopK's pass over all entries: which are at or above a threshold, without a mask in between."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_ext.kernels.compiler import compiled

GROUP = 32  # entries that are looked at together: most groups hold none


@compiled
def _above(flat: NDArray[Any], threshold: Any, found: NDArray[np.int64]) -> int:
    """How many there are; as many of their positions as ``found`` has place for."""
    count = 0
    zero = threshold == 0
    for begin in range(0, flat.size, GROUP):
        piece = flat[begin:begin + GROUP]
        hits = np.int32(0)
        for i in range(piece.size):
            hits += np.int32(abs(piece[i]) >= threshold)
        if hits and zero:
            for i in range(piece.size):
                if abs(piece[i]) > threshold:
                    if count < found.size:
                        found[count] = begin + i
                    count += 1
        elif hits and count + piece.size <= found.size:
            for i in range(piece.size):  # without a branch: written first, counted after
                found[count] = begin + i
                count += abs(piece[i]) >= threshold
        elif hits:
            for i in range(piece.size):
                if abs(piece[i]) >= threshold:
                    if count < found.size:
                        found[count] = begin + i
                    count += 1
    return count


def above(flat: NDArray[Any], threshold: float, expected: int) -> NDArray[np.int64]:
    """Rising positions of magnitudes at or above a threshold; above it when it is zero.

    Args:
        flat: (n,) float32 or float64.
        threshold: at least 0, of ``flat``'s precision.
        expected: about how many there are; with more it takes twice as long.
    """
    least = flat.dtype.type(threshold)
    found = np.empty(min(flat.size, expected + GROUP), np.int64)
    count = _above(flat, least, found)
    if count > found.size:
        found = np.empty(count, np.int64)
        _above(flat, least, found)
    return found[:count]

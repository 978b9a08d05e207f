"""TopK's pass over all entries: which are at or above a threshold, without a mask in between."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_ext.kernels.compiler import compile_loop

GROUP = 32  # entries that are looked at together: most groups hold none


@compile_loop
def _scan_above(flat: NDArray[Any], threshold: Any, found: NDArray[np.int64],
                magnitudes: NDArray[Any]) -> int:
    """How many there are; as many of their positions and magnitudes as there is place for."""
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
                        magnitudes[count] = abs(piece[i])
                    count += 1
        elif hits and count + piece.size <= found.size:
            for i in range(piece.size):  # without a branch: written first, counted after
                found[count] = begin + i
                magnitudes[count] = abs(piece[i])
                count += abs(piece[i]) >= threshold
        elif hits:
            for i in range(piece.size):
                if abs(piece[i]) >= threshold:
                    if count < found.size:
                        found[count] = begin + i
                        magnitudes[count] = abs(piece[i])
                    count += 1
    return count


def find_above(flat: NDArray[Any], threshold: float,
               expected: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Rising positions of magnitudes at or above a threshold, above it when it is zero; and these magnitudes.

    Args:
        flat: (n,) float32 or float64.
        threshold: at least 0, of ``flat``'s precision.
        expected: about how many there are; with more it takes twice as long.
    """
    least = flat.dtype.type(threshold)
    place = min(flat.size, expected + GROUP)
    while True:
        found, magnitudes = np.empty(place, np.int64), np.empty(place, flat.dtype)
        count = _scan_above(flat, least, found, magnitudes)
        if count <= place:
            return found[:count], magnitudes[:count]
        place = count

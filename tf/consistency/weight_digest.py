"""A number for the bits of an array."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def digest_tensors(arrays: Sequence[Any]) -> list[int]:
    """A 64-bit number for each NumPy array, equal where the bits are."""
    return [int.from_bytes(hashlib.blake2b(np.ascontiguousarray(array).view(np.uint8).data,
                                           digest_size=8).digest(), "big") for array in arrays]

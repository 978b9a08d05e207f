"""The short message by which ranks agree on a step: a digest of the plan and a few numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.int64]


def pack_row(digest: int, values: Sequence[float]) -> Row:
    """One rank's message: its length, the digest, the values' bits. Rows may differ in length."""
    row = np.empty(2 + len(values), np.int64)
    row[0], row[1] = len(row), digest
    row[2:] = np.asarray(values, np.float64).view(np.int64)
    return row


def unpack_rows(gathered: Row) -> tuple[list[int], list[list[float]]]:
    """All ranks' digests and values from their messages one after another."""
    digests, rows = [], []
    at = 0
    while at < len(gathered):
        row = gathered[at : at + int(gathered[at])]
        digests.append(int(row[1]))
        rows.append([float(value) for value in row[2:].view(np.float64)])
        at += len(row)
    return digests, rows

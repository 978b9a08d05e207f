"""Sparse allreduce with the owners' residual, in float64 NumPy, one process, every worker in turn."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tests.reference.spars_ams import top_k

Vector = npt.NDArray[np.float64]


class SparseAllreduce:
    """M workers' residuals e and the owners' residual O; which entries go back is given from outside.

    What is sent back depends on a threshold that owners estimate: the caller says which places it let
    through, and gets the means among which they were chosen.
    """

    def __init__(self, workers: int, numel: int) -> None:
        self.e = np.zeros((workers, numel))
        self.o = np.zeros(numel)
        self.applied = np.zeros(numel)
        self.seen = np.zeros(numel)

    def finish_exchange(self, gradients: Sequence[Vector], k: int) -> Vector:
        """Each worker's k largest of g + e, averaged, and O on top."""
        self.seen += np.sum(gradients, axis=0)
        total = np.asarray(gradients) + self.e
        sent = np.zeros_like(total)
        for worker, row in enumerate(total):
            chosen = top_k(row, k)
            sent[worker, chosen] = row[chosen]
        self.e = total - sent
        return sent.mean(axis=0) + self.o

    def apply(self, means: Vector, places: npt.NDArray[np.int64]) -> Vector:
        """Send the means at these places back, keep the others."""
        update = np.zeros_like(means)
        update[places] = means[places]
        self.o = means - update
        self.applied += update
        return update

    def fold(self, bounds: Sequence[int]) -> None:
        """Ranges change: what owner s kept of ``bounds[s]`` to ``bounds[s + 1]`` joins its e."""
        for worker, (low, high) in enumerate(itertools.pairwise(bounds)):
            self.e[worker, low:high] += len(self.e) * self.o[low:high]
        self.o[:] = 0.0

    def mass(self) -> Vector:
        """Zero where nothing is lost."""
        return self.e.sum(axis=0) + len(self.e) * (self.o + self.applied) - self.seen

"""PowerSGD (arXiv 1905.13727, Algorithms 1 and 2) in float64 NumPy, one matrix, all ranks in one process."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def orthonormal(p: Matrix) -> Matrix:
    """Gram-Schmidt on the columns, from the left (Algorithm 1, line 5)."""
    q = np.zeros_like(p)
    for k in range(p.shape[1]):
        column = p[:, k] - q[:, :k] @ (q[:, :k].T @ p[:, k])
        column -= q[:, :k] @ (q[:, :k].T @ column)
        q[:, k] = column / np.linalg.norm(column)
    return q


def powersgd(gradient: Callable[[int, int], Matrix], first_q: Callable[[int], Matrix], *, ranks: int,
             steps: int, feedback: bool = True, warm_start: bool = True
             ) -> tuple[list[Matrix], list[Matrix]]:
    """The method on one gradient matrix.

    Args:
        gradient: (rank, step) -> (n, m).
        first_q: step -> (m, r), what the power iteration begins with without a warm start.

    Returns:
        The mean that all ranks apply at each step, and each rank's residual after the last.
    """
    residuals = [np.zeros_like(gradient(0, 0)) for _ in range(ranks)]
    q, means = first_q(0), []
    for step in range(steps):
        if not warm_start:
            q = first_q(step)
        d = [gradient(rank, step) + residuals[rank] for rank in range(ranks)]
        p = orthonormal(sum(one @ q for one in d) / ranks)
        q = sum(one.T @ p for one in d) / ranks
        mean = p @ q.T
        if feedback:
            residuals = [one - mean for one in d]
        means.append(mean)
    return means, residuals

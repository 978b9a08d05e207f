"""PowerSGD (arXiv 1905.13727, Algorithms 1 and 2) in float64 NumPy, one matrix, all ranks in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


class PowerSGD:
    """One gradient matrix, step after step.

    Args:
        first_q: step -> (m, r), what the power iteration begins with; at step 0 only with a warm start.
        ranks: M.
        feedback: False drops what is left out.
        warm_start: whether Q of a step begins the next.
    """

    def __init__(self, first_q: Callable[[int], Matrix], ranks: int, *, feedback: bool = True,
                 warm_start: bool = True) -> None:
        self.first_q, self.ranks, self.feedback, self.warm_start = first_q, ranks, feedback, warm_start
        self.q = first_q(0)
        self.residuals: list[Matrix] = []
        self.steps = 0

    def reduce(self, gradients: Sequence[Matrix]) -> Matrix:
        """The mean that all ranks apply, (n, m), from each rank's gradient."""
        if not self.residuals:
            self.residuals = [np.zeros_like(one) for one in gradients]
        if not self.warm_start:
            self.q = self.first_q(self.steps)
        self.steps += 1
        d = [gradient + residual for gradient, residual in zip(gradients, self.residuals, strict=True)]
        p = orthonormal(sum(one @ self.q for one in d) / self.ranks)
        self.q = sum(one.T @ p for one in d) / self.ranks
        mean = p @ self.q.T
        if self.feedback:
            self.residuals = [one - mean for one in d]
        return mean

"""Delay-compensated synchronous SGD in float64 NumPy, written from the definition.

DC-ASGD supplement, section H, eq. 93-95; the adaptive rule from the paper's Algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class DelayOracle:
    """One process that sees every worker's gradient. Call it once a step."""

    lam: float = 2.0
    adaptive: bool = True
    decay: float = 0.95
    eps: float = 1e-7
    order: str = "norm"
    displacement: str = "cumulative"
    mean_square: np.ndarray | float = field(default=0.0)

    def reduce(self, gradients, lr):
        """The reduced gradient of a step.

        Args:
            gradients: M flat gradients at w_t, by worker.
            lr: a number, or an array with each element's learning rate.
        """
        gradients = [np.asarray(g, np.float64) for g in gradients]
        workers = len(gradients)
        step = np.asarray(lr, np.float64) / workers
        if workers == 1:  # one worker is plain SGD, whatever the reading
            self.landed = -step * gradients[0]
            return gradients[0]
        ranking = list(range(workers))
        if self.order == "norm":
            ranking.sort(key=lambda j: (np.sum((step * gradients[j]) ** 2), j))
        position = np.zeros_like(gradients[0])  # w~_j - w_t
        total = np.zeros_like(gradients[0])
        for j in ranking:
            g = gradients[j]
            lam = self.lam
            if self.adaptive:
                self.mean_square = self.decay * self.mean_square + (1 - self.decay) * g * g
                lam = self.lam / np.sqrt(self.mean_square + self.eps)
            moved = position if self.displacement == "cumulative" else -step * g
            compensated = g + lam * g * g * moved
            position = position - step * compensated
            total = total + compensated
        self.landed = position
        return total / workers

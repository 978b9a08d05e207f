"""What a way to reduce gradients gives at one step and keeps for the next, in float64 NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.reference.spars_ams import top_k

Vector = npt.NDArray[np.float64]
LR = 0.05  # of the optimizer: the steps of delay compensation


@dataclass
class Method:
    """How gradients are reduced: plain, TopK ("topk"), or delay compensated ("delay", "adaptive").

    Attributes:
        kind: the method.
        ranks: M.
        buckets: elements that travel together, by their number.
        state: what it keeps between steps.
    """

    kind: str
    ranks: int
    buckets: list[slice] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    ratio: float = 0.3
    lam: float = 0.8

    @property
    def repeatable(self) -> bool:
        """Whether reduced gradients may be reduced again."""
        return self.kind == "plain"

    def reduce_beside(self, gradients: Sequence[Vector], frozen: Any
                      ) -> tuple[Vector, dict[str, Any], bool]:
        """As ``reduce``, where what is frozen has no gradient, and what is kept of it waits."""
        size, before = len(gradients[0]), self.state
        lists = {key: value if key == "residuals" else [value] for key, value in before.items()}
        padded = {key: [np.pad(one, (0, size - len(one))) for one in value] for key, value in lists.items()}
        self.state = {key: [np.where(frozen, 0, one) for one in value] if key == "residuals"
                      else np.where(frozen, 0, value[0]) for key, value in padded.items()}
        reduced, after, good = self.reduce([np.where(frozen, 0, g) for g in gradients])
        self.state = before
        if after is not before and good:
            after = {key: [np.where(frozen, old, new) for old, new in
                           zip(padded.get(key, np.zeros((self.ranks, size))), value, strict=True)]
                     if key == "residuals" else
                     np.where(frozen, padded.get(key, [np.zeros(size)])[0], value)
                     for key, value in after.items()}
        return reduced, after if good else before, good

    def reduce(self, gradients: Sequence[Vector]) -> tuple[Vector, dict[str, Any], bool]:
        """The reduced gradient, the pending state, and whether the step may be taken."""
        finite = all(np.isfinite(g).all() for g in gradients)
        if self.kind == "topk":
            return self._top_k(gradients, finite)
        if self.kind == "plain" or self.ranks == 1 or not finite:
            return np.sum(gradients, axis=0) / self.ranks, self.state, True
        return self._compensate(gradients)

    def _top_k(self, gradients: Sequence[Vector], finite: bool) -> tuple[Vector, dict[str, Any], bool]:
        if not finite:
            return np.full_like(gradients[0], np.nan), self.state, False
        residuals, total = [], np.zeros_like(gradients[0])
        for rank, gradient in enumerate(gradients):
            kept = self.state.get("residuals", [np.zeros(0)] * self.ranks)[rank]
            a = gradient + np.pad(kept, (0, len(gradient) - len(kept)))
            sent = np.zeros_like(a)
            for bucket in self.buckets:
                length = bucket.stop - bucket.start
                chosen = top_k(a[bucket], max(1, round(self.ratio * length))) + bucket.start
                sent[chosen] = a[chosen]
            residuals.append(a - sent)
            total += sent
        return total / self.ranks, {"residuals": residuals}, True

    def _compensate(self, gradients: Sequence[Vector]) -> tuple[Vector, dict[str, Any], bool]:
        size = len(gradients[0])
        squares = [float(np.dot(g, g)) for g in gradients]
        order = sorted(range(self.ranks), key=lambda rank: (squares[rank], rank))
        kept = self.state.get("mean_square", np.zeros(0))
        mean_square = np.pad(kept, (0, size - len(kept)))
        displacement, total = np.zeros(size), np.zeros(size)
        for rank in order:
            g, lam = gradients[rank], self.lam
            if self.kind == "adaptive":
                mean_square = 0.95 * mean_square + 0.05 * g * g
                lam = self.lam / np.sqrt(mean_square + 1e-7)
            compensated = g + lam * g * g * displacement
            total += compensated
            displacement -= LR / self.ranks * compensated
        return total / self.ranks, {"mean_square": mean_square}, True

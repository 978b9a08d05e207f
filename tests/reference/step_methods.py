"""What a way to reduce gradients gives at one step and keeps for the next, in float64 NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.reference.powersgd import orthonormal
from tests.reference.seng import block_direction, dense_u, joint_direction
from tests.reference.spars_ams import top_k

Vector = npt.NDArray[np.float64]
LR = 0.05  # of the optimizer: the steps of delay compensation
MATRIX = (3, 2)  # the first parameter's shape: PowerSGD sends it as two factors
LAYERS = (slice(0, 6), slice(6, 10))  # SENG's
DAMPING = 0.25


@dataclass
class Method:
    """How gradients are reduced.

    Attributes:
        kind: "plain", "sum", "fp16", "topk", "topk_owners" (sparse allreduce), "powersgd", "delay",
            "adaptive", "seng" (each rank's own curvature) or "seng_full" (all ranks' in one system).
        ranks: M.
        buckets: elements that travel together, by their number.
        state: what it keeps between steps.
        apart: parameters that join together do not share a bucket.
        ratio, lam, rank: TopK's, delay compensation's, PowerSGD's.
        places: with "topk_owners", the entries that the owners sent back, by reduction; None: all.
        samples: with SENG, each rank's gradients by sample (rho, n) of the last backward pass.
    """

    kind: str
    ranks: int
    buckets: list[slice] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    apart: bool = False
    ratio: float = 0.3
    lam: float = 0.8
    rank: int = 1
    places: list[Any] | None = None
    samples: list[Vector] | None = None

    @property
    def repeatable(self) -> bool:
        """Whether reduced gradients may be reduced again."""
        return self.kind in ("plain", "fp16") or (self.kind == "sum" and self.ranks == 1)

    @property
    def skips(self) -> bool:
        """Whether all ranks skip a step in which some gradient is not finite."""
        return self.kind in ("topk", "topk_owners", "powersgd")

    def reduce_beside(self, gradients: Sequence[Vector], frozen: Any
                      ) -> tuple[Vector, dict[str, Any], bool]:
        """As ``reduce``, where what is frozen has no gradient, and what is kept of it waits."""
        if "seng" in self.kind:
            return self._natural_gradient(gradients)
        before, size = self.state, len(gradients[0])
        kept = {key: value if key == "q" else np.pad(value, [(0, 0)] * (value.ndim - 1) + [
            (0, size - value.shape[-1])]) for key, value in before.items()}
        given = self.state = {key: value if key == "q" else np.where(frozen, 0, value)
                              for key, value in kept.items()}
        reduced, after, good = self.reduce([np.where(frozen, 0, g) for g in gradients])
        if not good or after is given:
            after = before
        else:
            after = {key: value if key == "q" else np.where(frozen, kept.get(key, 0.0), value)
                     for key, value in after.items()}
            if "q" in after and frozen[0]:
                after["q"] = self._first_q()
        self.state = before
        return reduced, after, good

    def reduce(self, gradients: Sequence[Vector]) -> tuple[Vector, dict[str, Any], bool]:
        """The reduced gradient, the pending state, and whether the step may be taken."""
        finite = all(np.isfinite(g).all() for g in gradients)
        if self.skips and not finite:
            return np.full_like(gradients[0], np.nan), self.state, False
        if "topk" in self.kind:
            return self._top_k(gradients)
        if self.kind == "powersgd":
            return self._low_rank(gradients)
        if self.kind == "fp16" and self.ranks > 1:
            gradients = [g.astype(np.float16) for g in gradients]
            return (np.sum(gradients, axis=0, dtype=np.float16) / self.ranks).astype(float), self.state, True
        if self.kind == "sum":
            return np.sum(gradients, axis=0), self.state, True
        if self.kind == "plain" or self.ranks == 1 or not finite:
            return np.sum(gradients, axis=0) / self.ranks, self.state, True
        return self._compensate(gradients)

    def _top_k(self, gradients: Sequence[Vector]) -> tuple[Vector, dict[str, Any], bool]:
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
        if self.kind == "topk" or self.ranks == 1:
            return total / self.ranks, {"residuals": np.array(residuals)}, True
        kept = self.state.get("owners", np.zeros(0))
        means = total / self.ranks + np.pad(kept, (0, len(total) - len(kept)))
        places = np.flatnonzero(means) if self.places is None else self.places.pop(0)
        reduced = np.zeros_like(means)
        reduced[places] = means[places]
        for bucket in self.buckets:  # the largest go back
            sent, left = np.abs(reduced[bucket]), np.abs(means - reduced)[bucket]
            assert left.max() <= np.where(sent > 0, sent, np.inf).min() * (1 + 1e-6)
        return reduced, {"residuals": np.array(residuals), "owners": means - reduced}, True

    def _first_q(self) -> Vector:
        """Q that a step begins with, (m r,): what is kept, or the draw of the matrix' bucket, which is 1."""
        q, drawn = self.state.get("q"), np.random.default_rng([0, 1, 0])
        return q if q is not None and q.any() else drawn.standard_normal(MATRIX[1] * self.rank)

    def _low_rank(self, gradients: Sequence[Vector]) -> tuple[Vector, dict[str, Any], bool]:
        """Vogels et al., Algorithms 1 and 2, of the first parameter; the others are averaged."""
        size, matrix = len(gradients[0]), slice(0, MATRIX[0] * MATRIX[1])
        q = self._first_q().reshape(MATRIX[1], self.rank)
        kept = self.state.get("residuals", [np.zeros(0)] * self.ranks)
        totals = [g + np.pad(e, (0, size - len(e))) for g, e in zip(gradients, kept, strict=True)]
        d = [total[matrix].reshape(MATRIX) for total in totals]
        sketch = np.sum([one @ q for one in d], axis=0) / self.ranks
        p = orthonormal(sketch) if sketch.any() else sketch
        q = np.sum([one.T @ p for one in d], axis=0) / self.ranks
        mean = np.sum(gradients, axis=0) / self.ranks
        mean[matrix] = (p @ q.T).ravel()
        residuals = []
        for total in totals:
            left = np.zeros(size)
            left[matrix] = total[matrix] - mean[matrix]
            residuals.append(left)
        return mean, {"residuals": np.array(residuals), "q": q.ravel()}, True

    def _natural_gradient(self, gradients: Sequence[Vector]) -> tuple[Vector, dict[str, Any], bool]:
        """SENG eq. 8 of each layer, with curvature of every second step, or the next with a backward pass."""
        mean = np.sum(gradients, axis=0) / self.ranks
        step, captured = self.state.get("step", 0), self.samples
        self.samples = None
        if not np.isfinite(mean).all():
            return mean, self.state, True
        refreshes = self.state.get("due", True) and captured is not None
        samples = captured if refreshes else self.state["samples"]
        due = (step + 1) % 2 == 0 or (self.state.get("due", True) and not refreshes)
        direction = block_direction if self.kind == "seng" else joint_direction
        reduced = mean.copy()
        for layer in LAYERS:
            reduced[layer] = direction([dense_u(one[:, layer]) for one in samples], mean[layer], DAMPING)
        return reduced, {"step": step + 1, "samples": samples, "due": due}, True

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

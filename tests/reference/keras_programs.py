"""What a training loop's calls mean under Keras, in float64 NumPy: all ranks in one process.

A program is a list of operations (:data:`OPERATIONS`). :class:`KerasModel` says what the weights are after
each. With ``late`` a gradient is reduced when it is applied, one step later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.reference.step_methods import LR, Method, Vector
from tests.reference.step_programs import FROZEN, Model, ProgramError, Unspecified

OPERATIONS = ("apply", "thrown", "overflow", "freeze", "unfreeze", "save", "load", "flush")
WEIGHTED = [*OPERATIONS, *["apply"] * 5, *["thrown"] * 2]
MOMENTUM, CLIP = 0.875, 0.625  # Keras casts them to float32
SIZE = 10
PARTS = (FROZEN, slice(FROZEN.stop, SIZE))  # the variables


@dataclass
class KerasModel(Model):
    """The state of a training loop, with ``optimizer.apply`` or a distributed tape.

    Attributes:
        divisor: what the sum over ``passes`` is divided by.
        clip: the optimizer's argument, "clipnorm" or "global_clipnorm", or None.
        scaled: the loss is scaled, so that a gradient which is not finite ends the pass.
    """

    divisor: int = 1
    clip: str | None = None
    scaled: bool = False
    raw: Sequence[Vector] | None = None  # with ``late``: each rank's gradient that waits

    def apply(self, gradients: Sequence[Vector]) -> None:
        """A pass whose gradient is given to the optimizer."""
        given = [np.where(self._frozen(), 0, g) for g in gradients]
        with np.errstate(invalid="ignore"):
            self.gradients = given if self.gradients is None else [
                a + b for a, b in zip(self.gradients, given, strict=True)]
        self.done += 1
        if self.done == self.passes:
            given, self.gradients, self.done = [g / self.divisor for g in self.gradients], None, 0
            self._step(given)

    def thrown(self, gradients: Sequence[Vector]) -> None:
        """A pass whose gradient is dropped, after a tape has reduced it: nothing."""

    def overflow(self, gradients: Sequence[Vector]) -> None:
        """``apply`` of gradients that are not finite on rank 0."""
        if self.scaled:
            return
        if self.method.kind != "topk":
            raise Unspecified
        self.apply([gradients[0] * np.inf, *gradients[1:]])

    def _step(self, given: Sequence[Vector] | None) -> None:
        """Reduce and update; ``None`` is a flush."""
        good, mean = True, np.zeros(SIZE)
        used = self.raw if self.late else given
        if used is None:
            good = False
        else:
            mean, self.method.state, good = self.method.reduce_beside(used, self._frozen())
        if good:
            if self.late and self.before is not None:
                mean = mean + self.late_lam * mean * mean * (self.weights - self.before)
            mean = np.where(self._frozen(), 0, mean)
        if self.late:
            self.raw, self.before = given, self.weights.copy()
        if good:
            self._apply(self._clipped(mean), self._frozen())

    def _apply(self, gradient: Vector, still: Any) -> None:
        kept = np.zeros(SIZE) if self.momentum[0] is None else self.momentum[0]
        now = MOMENTUM * kept + gradient
        self.momentum[0] = np.where(still, kept, now)
        self.weights -= np.where(still, 0, LR * now)

    def _clipped(self, gradient: Vector) -> Vector:
        if self.clip is None:
            return gradient
        parts = PARTS if self.clip == "clipnorm" else (slice(0, SIZE),)
        return np.concatenate([gradient[part] * CLIP / max(CLIP, float(np.linalg.norm(gradient[part])))
                               for part in parts])

    def flush(self, _: Any = None) -> None:
        """``optimizer.flush()``."""
        if not self.late:
            raise Unspecified
        if self.done and self.passes > 1:
            raise ProgramError("RuntimeError")
        self._step(None)

    def freeze(self, _: Any = None, *, frozen: bool = True) -> None:
        """Leave the first variable out of the next calls, or take it in again."""
        if self.done:
            raise Unspecified
        self.frozen = frozen

    def save(self, _: Any = None) -> None:
        """Keep weights and state, between two steps."""
        if self.done:
            raise Unspecified
        super().save()
        self.saved = {**(self.saved or {}), "raw": self.raw}

    def load(self, _: Any = None) -> None:
        """Go back to what was saved."""
        if self.saved is None:
            raise Unspecified
        self.raw = self.saved["raw"]
        super().load()


def gradient_at(seed: int, position: int, rank: int) -> Vector:
    """A rank's gradient of one operation, (SIZE,)."""
    return np.random.default_rng([seed, position, rank]).standard_normal(SIZE)


def start_weights(seed: int) -> Vector:
    """The weights that a program begins with, (SIZE,)."""
    return np.random.default_rng(seed).standard_normal(SIZE)


def make_model(kind: str, ranks: int, seed: int, **options: Any) -> KerasModel:
    """A training loop before its first step."""
    method = Method("plain" if kind == "exact" else kind, ranks, [slice(0, SIZE)])
    return KerasModel(method, start_weights(seed), groups=[slice(0, SIZE)], **options)

"""What a training loop's calls mean, in float64 NumPy: all ranks in one process, one operation after another.

A program is a list of operations (:data:`OPERATIONS`). :class:`Model` says what the weights are after each,
or which error ends it. A step that is reduced has pending values; the update commits them, everything else
drops them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.reference.replies import half_reply
from tests.reference.step_methods import LR, Method, Vector

OPERATIONS = ("backward", "synchronize", "step", "step_in_skip", "zero_grad", "clear", "clip", "torch_clip",
              "save", "load", "flush", "skip_step", "closure", "add_group", "overflow", "freeze", "unfreeze",
              "unscale", "scaler_step", "update")
FROZEN = slice(0, 6)  # what is frozen between "freeze" and "unfreeze"
MOMENTUM, CLIP = 0.9, 0.6
FIRST_SCALE, GROWTH_INTERVAL = 8.0, 2  # of the GradScaler


class ProgramError(Exception):
    """The program ends here with an error on all ranks; its first argument names the error's type."""


class Unspecified(Exception):
    """What this operation means here is not specified: it is left out of the program."""


@dataclass
class Model:
    """The state of a training loop.

    Attributes:
        weights, momentum: flat; ``momentum`` None before the first update, by bucket of parameters.
        gradients: each rank's ``.grad``, None where it is None.
        done: backward passes since the last step.
        waiting: with ``late``, the gradient that the next update applies.
        scaler: a GradScaler multiplies each loss by ``scale``.
        overflowed: what ``unscale_()`` has found since the last ``update()``.
    """

    method: Method
    weights: Vector
    passes: int = 1
    late: bool = False
    late_lam: float = 0.0
    untouched: bool = False  # plain reduction on one rank: what Horovod makes an error there is none
    partial: bool = False  # each rank has what it owns only, from the second reduction on
    half_replies: bool = False  # owners send the change of their weights as float16
    owned: Vector | None = None  # and have these
    scaler: bool = False
    scale: float = 1.0
    tracker: int = 0  # steps since the scale last changed
    stage: str = "ready"  # "unscaled" after unscale_(), "stepped" after scaler.step()
    unscaled: bool = False  # the gradients are, since the last reduction
    overflowed: bool | None = None
    momentum: list[Vector | None] = field(default_factory=lambda: [None])
    groups: list[slice] = field(default_factory=list)
    gradients: list[Vector] | None = None
    done: int = 0
    reduced: bool = False
    settled: bool = False
    extended: bool = False
    good: bool = True
    pending: dict[str, Any] = field(default_factory=dict)
    sent_held: Any = None
    sent: Vector | None = None  # with ``late``: this step's reduced gradient
    waiting: Vector | None = None
    before: Vector | None = None  # the weights at which it was taken
    lacking: bool = False  # parameters that have joined since have no gradient in ``gradients``
    gathered: bool = True
    planned: bool = False
    saved: dict[str, Any] | None = None
    frozen: bool = False
    held: Any = None  # with ``late``: what was frozen when the gradient that waits was sent

    def __post_init__(self) -> None:
        if self.scaler:
            self.scale = FIRST_SCALE

    def _frozen(self) -> Any:
        found = np.zeros(len(self.weights), bool)
        found[FROZEN] = self.frozen
        return found

    @property
    def repeatable(self) -> bool:
        return self.method.repeatable and not self.late and self.gathered

    def run(self, operation: str, gradients: Sequence[Vector]) -> None:
        """Carry out an operation.

        Raises:
            ProgramError: it is an error on all ranks.
            Unspecified: it is to be left out.
        """
        getattr(self, operation)(gradients)

    def backward(self, gradients: Sequence[Vector]) -> None:
        if self.done == self.passes and not self.untouched:
            raise ProgramError("AssertionError")
        if "seng" in self.method.kind:  # by sample
            self.method.samples, gradients = list(gradients), [one.mean(0) for one in gradients]
        gradients = [g * self.scale for g in gradients]
        skipped = not self.good and not self.late  # nothing could be made of the gradients
        self.unscaled = False
        if self.reduced and (self.gradients is None or skipped) and not self.repeatable:
            self.abandon()
        elif self.reduced:
            if self.lacking:
                raise Unspecified
            self.extended = True
            if not self.repeatable:
                self.gradients = list(gradients) if self.gradients is None else [
                    a + b for a, b in zip(self.gradients, gradients, strict=True)]
                return
        self.done += 1
        self.gradients = list(gradients) if self.gradients is None else [
            a + b for a, b in zip(self.gradients, gradients, strict=True)]

    def overflow(self, gradients: Sequence[Vector]) -> None:
        if not (self.method.skips or self.scaler):
            raise Unspecified
        self.backward([gradients[0] * np.inf, *gradients[1:]])

    def synchronize(self, _: Any = None) -> None:
        if self.extended and not self.repeatable:
            raise ProgramError("RuntimeError")
        if self.gradients is None and self.done:
            raise Unspecified
        if not self.reduced or (self.repeatable and not (self.settled and not self.extended)):
            self._reduce()
        self.gathered = True

    def _reduce(self) -> None:
        if self.gradients is None:
            raise Unspecified
        if self.lacking and not self.done and self.method.ranks == 1:  # what has no gradient stays still
            raise Unspecified
        self._plan_buckets()
        mean, self.pending, self.good = self.method.reduce_beside(
            [g / self.scale for g in self.gradients], self._frozen())
        self.unscaled = False
        self.done, self.reduced, self.settled, self.extended = 0, True, False, False
        self.gathered = not (self.partial and self.planned)
        self.planned = True
        if self.late:
            self.sent, self.sent_held = mean, self._frozen()
            self.lacking = self.waiting is not None and len(self.waiting) < len(self.weights)
            mean = self._compensated()
            self.good = self.waiting is not None and (
                not self.method.skips or bool(np.isfinite(self.waiting).all()))
        self.gradients = [mean * self.scale for _ in self.gradients]

    def _plan_buckets(self) -> None:
        """What has joined since the last reduction, ``state_dict()`` or ``load_state_dict()``."""
        planned = self.method.buckets[-1].stop
        if planned < len(self.weights):
            ends = range(planned + NEW_SIZE, len(self.weights), NEW_SIZE) if self.method.apart else []
            for end in [*ends, len(self.weights)]:
                self.method.buckets.append(slice(self.method.buckets[-1].stop, end))

    def _compensated(self) -> Vector:
        """The gradient that waits, for the weights as they are now."""
        size = len(self.weights)
        if self.waiting is None or self.before is None:
            return np.zeros(size)
        g, before = (np.pad(one, (0, size - len(one))) for one in (self.waiting, self.before))
        now = g + self.late_lam * g * g * (self.weights - before)
        return np.where(self._still(), 0, now)

    def _still(self) -> Any:
        """What the next update leaves alone."""
        still = self._frozen()
        if self.late and self.held is not None:
            still |= np.pad(self.held, (0, len(still) - len(self.held)))
        return still

    def step(self, _: Any = None, *, synchronizes: bool = True) -> None:
        if self.scaler and (synchronizes or not self.unscaled):
            raise Unspecified
        if self.extended and not self.repeatable:
            raise ProgramError("RuntimeError")
        if self.reduced and self.gradients is None:
            raise Unspecified
        if synchronizes and not self.reduced:
            self._reduce()
        elif not synchronizes:
            if self.done and self.method.ranks > 1:
                raise ProgramError("RuntimeError")
            if not self.reduced:
                raise Unspecified
        elif not (self.settled and not self.extended):
            if not self.repeatable:
                raise ProgramError("RuntimeError")
            self._reduce()
        self._update()

    def step_in_skip(self, _: Any = None) -> None:
        self.step(synchronizes=False)

    def _update(self) -> None:
        self.method.state = self.pending
        if self.late:
            still = self._still()
            self.waiting, self.before, self.held = self.sent, self.weights.copy(), self.sent_held
        else:
            still = self._frozen()
        if self.good:
            assert self.gradients is not None
            self._apply(self.gradients[0], still)
        if self.partial:  # the loop clears them
            self.gradients = None
        self._accumulate_again()

    def unscale(self, _: Any = None) -> None:
        """``scaler.unscale_(optimizer)`` of reduced gradients."""
        if not self.scaler or self.stage != "ready" or not self.reduced or self.extended \
                or self.gradients is None or not self.gathered:
            raise Unspecified
        self.gradients = [g / self.scale for g in self.gradients]
        self.stage, self.unscaled = "unscaled", True
        self.overflowed = not bool(np.isfinite(np.where(self._still(), 0, self.gradients[0])).all())

    def scaler_step(self, _: Any = None) -> None:
        """``scaler.step(optimizer)`` within ``skip_synchronize()``: no update after an overflow."""
        if self.stage == "ready":
            self.unscale()
        elif self.stage == "stepped" or not self.unscaled:
            raise Unspecified
        self.stage = "stepped"
        if not self.overflowed:
            self.step(synchronizes=False)

    def update(self, _: Any = None) -> None:
        """``scaler.update()``, not between a backward pass and its reduction."""
        if self.overflowed is None or self.done:
            raise Unspecified
        self.tracker = 0 if self.overflowed else self.tracker + 1
        if self.overflowed or self.tracker == GROWTH_INTERVAL:
            self.scale *= 0.5 if self.overflowed else 2.0
            self.tracker = 0
        self.stage, self.overflowed = "ready", None

    def _apply(self, gradient: Vector, still: Any) -> None:
        if not np.isfinite(np.where(still, 0, gradient)).all():
            raise Unspecified
        if self.half_replies:
            self.owned = self.weights if self.owned is None else self.owned
            self.weights, held = self.owned.copy(), self.weights
        for number, group in enumerate(self.groups):
            kept = self.momentum[number]
            kept = np.zeros_like(gradient[group]) if kept is None else kept
            now = MOMENTUM * kept + gradient[group]
            self.momentum[number] = np.where(still[group], kept, now)
            self.weights[group] -= np.where(still[group], 0, LR * now)
        if self.half_replies:
            self.owned = self.weights
            self.weights = held + np.where(still, 0, half_reply(self.owned - held))

    def _accumulate_again(self) -> None:
        self.done = 0
        self.reduced = self.settled = self.extended = False
        self.good, self.gathered = True, True

    def abandon(self) -> None:
        """Drop what is pending; a gradient that no update can use does not wait any longer."""
        if self.reduced and self.late and self.waiting is not None and not np.isfinite(self.waiting).all():
            self._wait_for_sent()
        self._accumulate_again()

    def _wait_for_sent(self) -> None:
        self.waiting, self.before, self.held = self.sent, self.weights.copy(), self.sent_held
        self.method.state = self.pending

    def zero_grad(self, _: Any = None) -> None:
        if self.done and not self.reduced and not self.untouched:
            raise ProgramError("AssertionError")
        self.gradients = None
        self.abandon()

    def clear(self, _: Any = None) -> None:
        """``model.zero_grad()``, of which the optimizer learns nothing."""
        if not self.reduced or self.extended:
            raise Unspecified
        self.gradients = None

    def clip(self, _: Any = None) -> None:
        """``hvd.clip_grad_norm_``."""
        if self.gradients is None:
            raise Unspecified
        if not self.reduced or self.extended:
            if self.extended and not self.repeatable:
                raise ProgramError("RuntimeError")
            self._reduce()
        self.settled = True
        self._clip()

    def torch_clip(self, _: Any = None) -> None:
        """``torch.nn.utils.clip_grad_norm_`` on what ``.grad`` holds."""
        if not self.reduced or self.extended or self.gradients is None or not self.gathered:
            raise Unspecified
        self._clip()

    def _clip(self) -> None:
        assert self.gradients is not None
        norm = float(np.linalg.norm(self.gradients[0]))
        factor = min(1.0, CLIP / (norm + 1e-6)) if np.isfinite(norm) else np.nan
        self.gradients = [g * factor for g in self.gradients]

    def closure(self, gradients: Sequence[Vector]) -> None:
        """``step(closure)``: ``zero_grad()``, a backward pass and clipping in the closure."""
        if self.passes > 1 or self.scaler:
            raise Unspecified
        self.zero_grad()
        self.backward(gradients)
        self._reduce()
        self._clip()
        self._update()

    def flush(self, _: Any = None) -> None:
        if not self.late:
            raise Unspecified
        if self.done:
            raise ProgramError("RuntimeError")
        kept = self.gradients
        self.abandon()
        if self.waiting is not None:
            if np.isfinite(self.waiting).all():
                self._apply(self._compensated(), self._still())
            self.waiting = None
        self.gradients = kept

    def skip_step(self, _: Any = None) -> None:
        if self.done and not self.untouched:
            raise ProgramError("RuntimeError")
        if self.reduced and self.late:
            self._wait_for_sent()
        self.gradients = None  # the loop clears them
        self.abandon()

    def add_group(self, _: Any = None) -> None:
        if self.done or self.reduced or len(self.groups) > 2:
            raise Unspecified
        self.gradients = None
        self.groups.append(slice(len(self.weights), len(self.weights) + NEW_SIZE))
        self.momentum.append(None)
        self.weights = np.concatenate([self.weights, new_weights(len(self.groups))])
        if self.owned is not None:
            self.owned = np.concatenate([self.owned, new_weights(len(self.groups))])

    def freeze(self, _: Any = None, *, frozen: bool = True) -> None:
        """``requires_grad_`` between two steps, and ``model.zero_grad()``."""
        if self.done or self.reduced or "seng" in self.method.kind:
            raise Unspecified
        self.gradients, self.frozen = None, frozen

    def unfreeze(self, _: Any = None) -> None:
        self.freeze(frozen=False)

    def save(self, _: Any = None) -> None:
        """``state_dict()``, also in the middle of a step: what holds then."""
        if self.late and self.done:
            raise Unspecified
        self._plan_buckets()
        self.saved = {"weights": self.weights.copy(), "groups": len(self.groups), "owned": self.owned,
                      "momentum": [None if m is None else m.copy() for m in self.momentum],
                      "state": self.method.state,
                      "waiting": self.waiting, "before": self.before, "held": self.held}

    def load(self, _: Any = None) -> None:
        """``load_state_dict()`` of what was saved, and ``model.zero_grad()``."""
        if self.saved is None or self.saved["groups"] != len(self.groups):
            raise Unspecified
        self._plan_buckets()
        self.weights, self.owned = self.saved["weights"].copy(), self.saved["owned"]
        self.momentum = [None if m is None else m.copy() for m in self.saved["momentum"]]
        self.method.state, self.waiting = self.saved["state"], self.saved["waiting"]
        self.before, self.held = self.saved["before"], self.saved["held"]
        self.gradients = None
        self.abandon()


NEW_SIZE = 4


def new_weights(number: int) -> Vector:
    """The weights of a parameter that joins as group ``number``."""
    return np.random.default_rng(100 + number).standard_normal(NEW_SIZE)

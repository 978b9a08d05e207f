"""The step of a distributed optimizer as a state machine: which call reduces, and which is an error.

accumulating -> reduced -> applied or abandoned

``synchronize()`` makes a step *reduced*; only the update applies it. Until then whatever an extension keeps
between steps (residuals, moments, curvature, counters) has a pending value beside the one that holds. The
update commits the pending values; ``zero_grad()``, ``load_state_dict()``, ``flush()`` and a backward pass
into fresh gradients drop them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

WARNING = ("optimizer.step() called without optimizer.skip_synchronize() context after "
           "optimizer.synchronize(). This can cause training slowdown. You may want to consider using "
           "optimizer.skip_synchronize() context if you use optimizer.synchronize() in your code.")


class StepError(RuntimeError):
    """A call that a step does not allow where it is; all ranks raise it, and what is on its way arrives."""


@dataclass
class StepState:
    """Where a step is.

    Attributes:
        reduced: the gradients are reduced, and neither applied nor abandoned.
        good: whether the reduced step may be taken; all ranks agree.
        settled: the library has reduced them (clipping, a closure), and ``step()`` takes them as they are.
        extended: a backward pass has added to the reduced gradients.
        updates: how many steps have been applied since the optimizer was made.
    """

    reduced: bool = False
    good: bool = True
    settled: bool = False
    extended: bool = False
    updates: int = 0

    def reset(self) -> None:
        """Back to accumulating."""
        self.reduced = self.settled = self.extended = False
        self.good = True

    def begin_reduced(self, good: bool) -> None:
        """The gradients have just been reduced."""
        self.reduced, self.good, self.settled, self.extended = True, good, False, False

    def reduces_on_synchronize(self, method: str, *, repeatable: bool) -> bool:
        """Whether ``synchronize()`` has to reduce.

        Args:
            method: the extension in use, for the error.
            repeatable: reducing reduced gradients again gives what one process would have.

        Raises:
            StepError: a backward pass has added to reduced gradients, and ``method`` cannot reduce again.
        """
        if self.extended and not repeatable:
            raise StepError(accumulated_after_reduction(method))
        if not self.reduced:
            return True
        return repeatable and not (self.settled and not self.extended)

    def reduces_on_step(self, method: str, *, synchronizes: bool, begun: bool, repeatable: bool,
                        ranks: int) -> bool:
        """Whether ``step()`` has to reduce before the update.

        Args:
            method: as above.
            synchronizes: False within ``skip_synchronize()``.
            begun: a backward pass has finished gradients that are not reduced.
            repeatable: as above.
            ranks: how many share the gradients.

        Raises:
            StepError: the update would use gradients that are not reduced, or reduced twice.
        """
        if self.extended and not repeatable:
            raise StepError(accumulated_after_reduction(method))
        if synchronizes and not self.reduced:
            return True
        if not synchronizes:
            if begun and ranks > 1:
                raise StepError(
                    "optimizer.step() within optimizer.skip_synchronize() would use gradients of this rank "
                    "alone: they are not reduced yet; call optimizer.synchronize() after the last "
                    "loss.backward()")
            return False
        if self.settled and not self.extended:
            return False
        if repeatable:
            return True
        raise StepError(
            f"optimizer.step() after optimizer.synchronize() would reduce the gradients a second time, which "
            f"{method} cannot do: call step() within `with optimizer.skip_synchronize():`")


class ReducedGradients:
    """Knows the gradients of a reduction again, where a backward pass must not add to them."""

    def __init__(self) -> None:
        self._known: dict[Any, weakref.ref[Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    def remember_gradients(self, gradients: Iterable[tuple[Any, Any]]) -> None:
        """Know these (parameter, gradient) pairs, and no others."""
        self._known = {parameter: weakref.ref(gradient) for parameter, gradient in gradients
                       if gradient is not None}

    def forget_gradients(self) -> None:
        """Know none."""
        self._known = {}

    def includes_gradient(self, parameter: Any, gradient: Any) -> bool:
        """Whether ``gradient`` is still the parameter's of the reduction."""
        known = self._known.get(parameter)
        return known is not None and gradient is not None and known() is gradient


def accumulated_after_reduction(method: str) -> str:
    """The error of a backward pass on top of reduced gradients."""
    return (
        "loss.backward() has added to gradients that optimizer.synchronize() had reduced, and "
        f"{method} cannot reduce them a second time: to accumulate over N backward passes give "
        "hvd.DistributedOptimizer backward_passes_per_step=N and synchronize once, after the last of them; "
        "to throw the reduced gradients away call optimizer.zero_grad() before the next backward pass")

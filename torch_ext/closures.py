"""A closure given to ``step()``: its gradients are reduced as soon as ``loss.backward()`` has made them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hvd_ext.step import StepError

if TYPE_CHECKING:
    from hvd_ext.torch.step import DistributedStep


class ClosureReduction:
    """Reduces at the end of the backward pass that completes the step's gradients.

    What the closure does then (clipping, reading norms) sees reduced gradients, as between ``synchronize()``
    and ``step()``. Where some parameter has no gradient, nobody knows whether another backward pass follows:
    the reduction waits for the end of the closure, and changing gradients before that is an error.

    Args:
        wrapper: whose step evaluates the closure.
    """

    def __init__(self, wrapper: DistributedStep) -> None:
        self._wrapper = wrapper
        self._queued = False
        self._seen: dict[torch.Tensor, tuple[torch.Tensor, int]] = {}

    def gradient_ready(self, parameter: torch.Tensor) -> None:
        """A backward pass has finished ``parameter.grad``."""
        if parameter.grad is not None:
            self._seen[parameter] = parameter.grad, parameter.grad._version
        if not self._queued:
            engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            engine.queue_callback(self._end_backward)
            self._queued = True

    def _end_backward(self) -> None:
        self._queued = False
        if not self._wrapper.state.reduced and self._wrapper.has_all_gradients():
            self._wrapper.synchronize(settle=True)
            self._wrapper.gather_gradients()  # the closure may read all of them
            self._seen.clear()

    def check_gradients_unchanged(self) -> None:
        """At the end of the closure.

        Raises:
            StepError: it has changed gradients that are not reduced.
        """
        if self._wrapper.state.reduced:
            return
        changed = [gradient for parameter, (gradient, version) in self._seen.items()
                   if parameter.grad is not gradient or gradient._version != version]
        if changed:
            raise StepError(
                f"the closure has changed {len(changed)} gradients after loss.backward() that are not "
                "reduced yet, since other parameters have no gradient in this step; call "
                "optimizer.synchronize() in the closure, after loss.backward()")

"""Gradients that are exchanged beside the next step's compute, over any reducer:
``overlap=hvd.DelayedUpdate(...)``.

take what the last step sent -> send this step's -> compensate what was taken -> hand it out
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from hvd_ext.consistency.fingerprint import Fingerprint, describe_settings
from hvd_ext.reducers.delayed_update import STATE, DelayedUpdate
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.state import Part
from hvd_ext.torch.collectives import Handle, begin_for_next_step
from hvd_ext.torch.reducers.base import NamedParameter, Reducer, norm_and_finite
from hvd_ext.torch.reducers.delayed_update_step import DelayedState, FrozenLossScale, ReducedGradients
from hvd_ext.torch.reducers.kernels.delay_compensation import accumulation_dtype
from hvd_ext.torch.reducers.kernels.delayed_update import advance_mean_square, compensate_gradient

WARN_AFTER = 3  # steps thrown away in a row
KEPT_WAITING = (
    f"{WARN_AFTER} steps in a row were thrown away (zero_grad() after synchronize()) while the same delayed "
    "gradient waits: each took its own gradients with it, and the one that waits is handed out again. To "
    "skip what synchronize() has handed out, a spike for example, call optimizer.skip_step()")


class DelayedReducer(Reducer):
    """Hands out what the reducer ``inner`` was given one step before.

    At a step the exchange of the last step's gradients ends and that of this step's begins, so that at
    most one is on its way. ``parameter.grad`` of the step is the memory that its exchange ends in, and what
    is handed out is other memory. The first step hands out nothing, and is not taken.

    The gradient that waits stays until an update has used it. A step that is thrown away takes its own
    gradients with it, not the one that waits; unless that one is not finite, which no step could use.

    Args:
        make: makes the inner reducer from options.
        overlap: the strength of the compensation.
        options: what every way to reduce is given.
    """

    saved_as = "LateReducer"  # in checkpoints

    staleness = 1

    def __init__(self, make: Callable[[ReductionOptions], Reducer], overlap: DelayedUpdate,
                 options: ReductionOptions) -> None:
        self._scale = FrozenLossScale(options.loss_scale)
        self.inner = make(replace(options, loss_scale=self._scale))
        super().__init__(self.inner.collectives, self.inner.settings, options)
        self.overlap = overlap
        self.own = DelayedState(self)
        self._flying: dict[NamedParameter,
                           torch.Tensor | None] | None = None  # parameter.grad of what was sent
        self._handed_out = False  # this step has been reduced, and neither taken nor thrown away
        self._memory: dict[NamedParameter, torch.Tensor] = {}  # of what is handed out
        self._corrected = False  # what was handed out is compensated
        self._thrown_away = 0  # steps in a row, with the same gradient waiting

    @property
    def passes(self) -> int:
        """Backward passes per step."""
        return self.inner.passes

    @passes.setter
    def passes(self, passes: int) -> None:
        self.inner.passes = passes

    @property
    def averages(self) -> bool:
        return self.inner.averages

    @property
    def linear(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return "overlap="

    def register_parameters(self, entries: Sequence[NamedParameter]) -> None:
        super().register_parameters(entries)
        self.inner.register_parameters(entries)

    def after_agreement(self) -> None:
        self.inner.after_agreement()

    def gradient_ready(self, entry: NamedParameter, passes_done: int, pass_number: int) -> None:
        """What is on its way has the inner reducer's memory until the step, and goes on."""
        self.inner.poll()

    # The step

    def finish(self) -> bool:
        self._wait_previous()
        try:
            self._send_gradients()
            good = self._publish(self._current_loss_scale())
        except BaseException:
            self.abort_step()
            raise
        self._handed_out = True
        return good

    def flush(self) -> bool:
        """Hand out what waits, without the loss's scale; whether there is an update to make."""
        self._wait_previous()
        if self.own.arrived is None:
            return False
        good = self._publish(1.0)
        if good and self.own.arrived.scale != 1.0:  # a GradScaler would skip it
            good = norm_and_finite([gradient for entry in self.entries
                                    if (gradient := entry.parameter.grad) is not None])[1]
        self._handed_out = True
        return good

    def commit(self) -> None:
        if not self._handed_out:
            return
        if self._corrected:
            assert self.own.arrived is not None
            for entry, gradient in self.own.arrived.gradients.items():
                if entry in self.frozen:
                    continue
                if entry in self.own.before and (kept := self._mean_square(entry)) is not None:
                    self.own.mean_square[entry] = kept
                    advance_mean_square(kept, gradient, self.overlap, self.own.arrived.scale)
        self.own.updates += self.own.arrived is not None and self.own.arrived.good
        self.own.arrived = None
        self._keep_weights()
        self._handed_out, self._thrown_away = False, 0

    def abandon(self) -> None:
        if not self._handed_out:
            return
        self._handed_out = False
        if self.own.arrived is not None and not self._is_usable(self.own.arrived):
            self.own.arrived = None  # what this step has sent waits in its place
            self._keep_weights()
            return
        self.inner.drain()
        self._flying = None
        self._scale.held = None
        self._thrown_away += self.own.arrived is not None
        if self._thrown_away == WARN_AFTER:
            warnings.warn(KEPT_WAITING, stacklevel=4)

    def skip_step(self) -> None:
        """Throw away also the gradient that waits, at the end of a step that was reduced."""
        if self._handed_out:
            self.own.arrived, self._handed_out, self._thrown_away = None, False, 0
            self._keep_weights()

    def _is_usable(self, arrived: ReducedGradients) -> bool:
        return arrived.good and norm_and_finite(list(arrived.gradients.values()))[1]

    def _wait_previous(self) -> None:
        """Wait for what the last step has sent, if it has not been waited for."""
        if self._flying is None or self._handed_out:  # what this step has sent is not its successor's yet
            return
        own = [entry.parameter.grad for entry in self.entries]
        try:
            for entry in self.entries:
                entry.parameter.grad = self._flying.get(entry)
            good = self.inner.finish()
            self.inner.commit()  # the step that sent it was taken
            # Those that were made dense on their way (sparse_as_dense) come back sparse.
            gradients = {entry: entry.parameter.grad.to_dense() for entry in self.entries
                         if entry.parameter.grad is not None}
        finally:
            self._flying = None
            for entry, gradient in zip(self.entries, own, strict=True):
                entry.parameter.grad = gradient
        self.own.arrived = ReducedGradients(good, gradients, self._scale())
        self._scale.held = None

    def _send_gradients(self) -> None:
        """Start the exchange of this step's gradients, all of it."""
        self._scale.held = self._scale()
        self.inner.frozen = set(self.frozen)  # until it arrives
        for entry in self.entries:
            gradient = entry.parameter.grad
            if gradient is not None:
                if gradient.is_sparse and not self.options.sparse_as_dense:
                    raise ValueError(f"{entry.name} has a sparse gradient, which overlap= cannot take; pass "
                                     "sparse_as_dense=True to DistributedOptimizer, or make the layer's "
                                     "gradient dense")
                self.inner.gradient_ready(entry, self.passes, 1)
        self.inner.start_remaining()
        begin_for_next_step(self.pending_handles())
        self._flying = {entry: entry.parameter.grad for entry in self.entries}

    def _is_compensated(self) -> bool:
        arrived = self.own.arrived
        return (arrived is not None and arrived.good and self.overlap.lam > 0
                and norm_and_finite(list(arrived.gradients.values()))[1])

    def _publish(self, scale: float) -> bool:
        """Put what waits into ``parameter.grad``, compensated, with this loss scale; whether to apply it."""
        arrived = self.own.arrived
        rescale = 1.0 if arrived is None else scale / arrived.scale
        correct = self._corrected = self._is_compensated()
        for entry in self.entries:
            gradient = None if arrived is None else arrived.gradients.get(entry)
            if entry in self.frozen or (arrived is not None and gradient is None):
                entry.parameter.grad = None  # frozen now, or when what arrived was sent
                continue
            out = self._memory.get(entry)
            if out is None or out is entry.parameter.grad:  # which is on its way, or the caller's in flush()
                out = self._memory[entry] = torch.empty_like(entry.parameter, requires_grad=False)
            entry.parameter.grad = out
            if arrived is None or gradient is None:
                out.zero_()
            elif correct and entry in self.own.before:
                with torch.no_grad():
                    compensate_gradient(gradient, entry.parameter, self.own.before[entry],
                                        self._mean_square(entry),
                                        self.overlap, arrived.scale, out)
                out.mul_(rescale) if rescale != 1.0 else None
            else:
                torch.mul(gradient, rescale, out=out)
            if self.options.sparse_only:
                entry.parameter.grad = out.to_sparse(1)
        return arrived is not None and arrived.good

    def _current_loss_scale(self) -> float:
        """The loss scale of this step."""
        return float(self._scale.now())

    def _mean_square(self, entry: NamedParameter) -> torch.Tensor | None:
        if not self.overlap.keeps_mean_square:
            return None
        kept = self.own.mean_square.get(entry)
        if kept is None:
            kept = torch.zeros_like(entry.parameter, dtype=accumulation_dtype(entry.parameter.dtype),
                                    requires_grad=False)
        return kept

    def _keep_weights(self) -> None:
        """Keep the weights of this step, before its update: those at which what it has sent was taken."""
        if self.overlap.lam == 0 or not self._flying:
            return
        for entry in self.entries:
            if entry not in self.own.before:
                self.own.before[entry] = torch.empty_like(entry.parameter, requires_grad=False)
        with torch.no_grad():
            torch._foreach_copy_([self.own.before[entry] for entry in self.entries],
                                 [entry.parameter for entry in self.entries])

    # After errors, and between steps

    def abort_step(self) -> None:
        self.inner.abort_step()
        self._flying = None
        self._handed_out = False
        self._scale.held = None

    def drain(self) -> None:
        """Nothing of a step under way has been sent; what the last one has sent goes on."""

    def _drop_sent(self) -> None:
        """Drop also what the last step has sent, on all ranks alike."""
        self.inner.drain()
        self.abort_step()
        self.own.arrived = None

    def pending_handles(self) -> list[Handle]:
        return self.inner.pending_handles()

    # What must be the same on every rank

    def build_fingerprint(self) -> Fingerprint:
        waits = self._flying is not None or self.own.arrived is not None
        mine = (*describe_settings(self.overlap), f"{self.own.updates} updates", f"one waits: {waits}")
        return Fingerprint((*self.inner.build_fingerprint().lines, *(f"overlap: {line}" for line in mine)))

    # State

    def declared_state(self) -> list[tuple[Reducer, Part]]:
        return [*self.inner.declared_state(), *((self, part) for part in STATE)]

    def settle(self) -> None:
        self._wait_previous()

    def forget_step(self) -> None:
        self._drop_sent()
        self.inner.forget_step()
        self.met = None  # the ranks compare whether a gradient waits

    def fold_local_state(self) -> None:
        self.inner.fold_local_state()

    def on_state_taken(self) -> None:
        self.inner.on_state_taken()

    def on_ranks_lost(self, ranks: int) -> None:
        self.inner.on_ranks_lost(ranks)

    def drop_in_flight(self) -> None:
        if self._flying is not None:
            self._drop_sent()

    def progress_values(self) -> tuple[float, ...]:
        waits = self._flying is not None or self.own.arrived is not None
        return *self.inner.progress_values(), self.own.updates, not waits

    def report(self) -> dict[str, Any]:
        held = sum(tensor.numel() * tensor.element_size() for tensor in self.own.state_tensors())
        return {**self.inner.report(), "steps": self.own.updates,
                "overlap": {"updates": self.own.updates, "bytes_held": held}}

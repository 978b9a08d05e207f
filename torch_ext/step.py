"""An optimizer with extensions in its step: hooks, and the two halves of the step (``hvd_ext/step.py``).

Backward hook -> reducer -> ``synchronize()``: reduced, then preconditioned -> the user's clipping, if any ->
``step()``: the update, where ``server=`` says.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from hvd_ext.reducers.registry import public_name
from hvd_ext.step import WARNING, ReducedGradients, StepError, StepState
from hvd_ext.torch.backward_pass_tracker import BackwardPassTracker
from hvd_ext.torch.closures import ClosureReduction
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.consistency import handshake
from hvd_ext.torch.hooks import check_real, let_go, remove_hooks
from hvd_ext.torch.reducers.base import NamedParameter, Reducer
from hvd_ext.watchdog.watchdog import WATCH

ACTIVE_WRAPPERS: weakref.WeakSet[DistributedStep] = weakref.WeakSet()  # the wrappers of this process


class DistributedStep:
    """``optimizer._hvd_ext``; it and its hooks hold the optimizer weakly: dropping one removes its hooks."""

    original: Callable[[], Any] = staticmethod(lambda: None)  # the optimizer that was wrapped
    grad_scaler: Any = None
    uneven: Any = None  # the block of hvd.uneven_inputs that it is in
    loaded: str | None = None  # since the last step: "own", this rank's state; "new", state that begins new

    def __init__(self, optimizer: torch.optim.Optimizer, names: dict[Any, str], reducer: Reducer,
                 preconditioner: Any, server: Any) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.reducer = reducer
        self.preconditioner = preconditioner
        self.server = server
        self._names = names
        self.state = StepState()
        self._reduced_gradients = ReducedGradients()
        self.closure: ClosureReduction | None = None  # while step() evaluates a closure
        self._passes = BackwardPassTracker(reducer, alone=preconditioner is None and server is None)
        self._hooks: dict[torch.Tensor, Any] = {}
        self.ranks = self.collectives.size if self.collectives.is_member else 0
        self._hook_parameters()
        weakref.finalize(self, let_go, self._hooks, reducer, self._passes)
        ACTIVE_WRAPPERS.add(self)
        if preconditioner is not None:
            preconditioner.attach(self.collectives, optimizer)
        if server is not None:
            server.attach_optimizer(self.collectives, optimizer, reducer.options.groups, self._names)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The extended optimizer."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    @property
    def collectives(self) -> Collectives:
        """The ranks that the optimizer's gradients are reduced over."""
        return self.reducer.collectives

    # The step: synchronize() and update() are its two halves

    def synchronize(self, *, settle: bool = False) -> None:
        """accumulating -> reduced, where that is not so yet: reduce, then precondition.

        Args:
            settle: ``step()`` takes the reduced gradients as they are, also outside ``skip_synchronize()``.
        """
        if not self.collectives.is_member:
            return
        with self._failing_together():
            if (settle and self.state.reduced and not self.state.extended) \
                    or not self.state.reduces_on_synchronize(self.method, repeatable=self._is_repeatable):
                self.state.settled |= settle
                return
            self._reduce_gradients()
            self.state.settled = settle
            if self.uneven is not None:
                self.uneven.touched = True

    def synchronize_for_step(self, synchronizes: bool) -> None:
        """What ``step()`` still has to reduce; ``synchronizes`` is False within ``skip_synchronize()``."""
        if not self.collectives.is_member:
            return
        with self._failing_together():
            if self.state.reduces_on_step(self.method, synchronizes=synchronizes,
                                          begun=self.step_in_progress(),
                                          repeatable=self._is_repeatable, ranks=self.collectives.size):
                if self.state.reduced:
                    warnings.warn(WARNING, stacklevel=4)
                self._reduce_gradients()
                if self.uneven is not None:
                    self.uneven.touched = False

    def _reduce_gradients(self) -> None:
        self.loaded = None
        self._hook_parameters()
        self._meet_ranks()
        self.reducer.find_frozen(self._passes.done)
        handshake.agree_on_optimizers(self, [one for one in ACTIVE_WRAPPERS if one._optimizer() is not None])
        if self.preconditioner is not None:
            self.preconditioner.before_reduce()
        if self.uneven is not None:
            self.uneven.before_reduce()
        good = self.reducer.finish()
        if self.uneven is not None:
            self.uneven.after_reduce()
        if good and self.preconditioner is not None:
            self.preconditioner.precondition()
        self.state.begin_reduced(good)
        self._passes.begin_step()
        if not self._is_repeatable and (good or self.reducer.staleness):
            self._reduced_gradients.remember_gradients((e.parameter, e.parameter.grad)
                                                       for e in self.reducer.entries)
        WATCH.mark_step_done()
        self.collectives.traffic.step()

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """After an error, which all ranks raise, nothing of the step is left and the next one may begin."""
        try:
            yield
        except BaseException as error:
            self._passes.begin_step()
            self.reducer.drain() if isinstance(error, StepError) else self.reducer.abort_step()
            if self.uneven is not None:
                self.uneven.abort_step()
            with suppress(Exception):  # the error that is being raised says more
                self._drop_pending()
            raise

    def apply_update(self, inner_step: Callable[[], Any]) -> Any:
        """reduced -> applied: commit what is pending, then the wrapped optimizer's update where it belongs.

        A step that the ranks agreed to skip is not taken.
        """
        self.state.updates += self.state.good
        if not self.collectives.is_member:
            return inner_step()
        good, reduced = self.state.good, self.state.reduced
        self._drop_begun()
        if reduced:
            if self.uneven is not None:
                self.uneven.update_follows()
            self.state.reset()
            self._reduced_gradients.forget_gradients()
            self.reducer.commit()
            if self.preconditioner is not None:
                self.preconditioner.commit() if good else self.preconditioner.abandon()
        if not good:
            return None
        if self.server is None:
            return inner_step()
        result = self.server.step(inner_step)
        self.reducer.on_weights_updated()
        self.collectives.traffic.step(same=True)
        return result

    def abandon_step(self) -> None:
        """reduced -> accumulating: the reduced gradients are thrown away, on all ranks alike."""
        if self.state.reduced:
            self._drop_step()
        self.state.reset()
        self._reduced_gradients.forget_gradients()

    def _drop_step(self) -> None:
        if self.uneven is not None:
            self.uneven.abandon_follows()
        self._drop_pending()
        self._drop_begun()

    def _drop_begun(self) -> None:
        """Drop what a backward pass after the reduction has sent, on all ranks alike."""
        if self.step_in_progress():
            self._passes.begin_step()
            self.reducer.drain()

    def skip_step(self) -> None:
        """reduced -> accumulating: as ``abandon_step()``, and a delayed gradient that was handed out is
        gone too.

        Raises:
            RuntimeError: gradients are on their way.
        """
        if self.step_in_progress():
            raise RuntimeError("skip_step() was called after loss.backward() and before "
                               "optimizer.synchronize(); synchronize first")
        if self.state.reduced:
            self.reducer.skip_step()
        self.abandon_step()

    def _drop_pending(self) -> None:
        self.state.reset()
        self.reducer.abandon()
        if self.preconditioner is not None:
            self.preconditioner.abandon()

    def flush(self, inner_step: Callable[[], Any], before_update: Callable[[], Any] | None) -> None:
        """Take the update of gradients that are late, if there is one; ``parameter.grad`` stays as it is.

        Raises:
            RuntimeError: a step has begun.
        """
        if not self.collectives.is_member or not self.reducer.staleness:
            return
        if self.step_in_progress():
            raise RuntimeError("flush() was called between backward() and step(); call it after step()")
        self.abandon_step()
        kept = [(p, p.grad) for group in self.optimizer.param_groups for p in group["params"]]
        self.reducer.find_frozen({})
        try:
            with self._failing_together():
                good = self.reducer.flush()
            self.state.begin_reduced(good)
            if good and before_update is not None:
                before_update()
            self.apply_update(inner_step)
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient

    @property
    def method(self) -> str:
        """The extension in the way of a second reduction, as a user wrote it."""
        if self.preconditioner is not None:
            return f"preconditioner={type(self.preconditioner).__name__}"
        return self.reducer.name if self.uneven is None else "hvd.uneven_inputs"

    @property
    def _is_repeatable(self) -> bool:
        return self.reducer.repeatable and self.preconditioner is None and self.uneven is None

    @property
    def _is_untouched(self) -> bool:
        return self.uneven is None and self._passes.is_untouched()

    def _leave_reduced_by_backward(self, parameter: torch.Tensor) -> None:
        """A backward pass has followed a reduction: on top of its gradients, or in place of them."""
        if self._reduced_gradients.includes_gradient(parameter, parameter.grad):
            self.state.extended = True
        elif self._is_repeatable:
            self.state.extended = self.state.reduced
        elif self.state.reduced and not self.state.extended:
            self._drop_step()  # a backward pass may still add to others of them

    def gather_gradients(self) -> None:
        """Bring reduced gradients that only their owners have to all ranks."""
        if self.collectives.is_member and self.reducer.owner_only:
            if self.uneven is not None:
                self.uneven.gather_follows()
            self.reducer.gather_gradients()

    @contextmanager
    def exact_weights(self) -> Iterator[None]:
        """Let the parameters hold the owners' exact weights; a collective.

        Raises:
            RuntimeError: a step has begun.
        """
        if self.server is None or not self.collectives.is_member:
            yield
            return
        if self.step_in_progress() or self.state.reduced:
            raise RuntimeError("exact_weights() was entered between backward() and step(); enter it after "
                               "step()")
        with self.server.exact_weights():
            yield

    def step_in_progress(self) -> bool:
        """Whether gradients of this step are on their way."""
        return bool(self._passes.done) and not self._is_untouched

    def has_all_gradients(self) -> bool:
        """Whether every parameter has its gradient of this step's last backward pass."""
        return all(self._passes.done[entry.parameter] >= self.reducer.passes
                   for entry in self.reducer.entries if entry.parameter.requires_grad)

    @contextmanager
    def reducing_in_closure(self, synchronizes: bool) -> Iterator[None]:
        """While ``step()`` evaluates a closure; ``synchronizes`` is False within ``skip_synchronize()``."""
        if synchronizes and self.collectives.is_member:
            self.closure = ClosureReduction(self)
        try:
            yield
            if self.closure is not None:
                with self._failing_together():
                    self.closure.check_gradients_unchanged()
        finally:
            self.closure = None

    def set_passes(self, passes: int) -> None:
        """Change the number of backward passes per step; between steps only."""
        self.abort_step()
        self.reducer.passes = passes

    def abort_step(self) -> None:
        """Drop what was begun for this step, on all ranks alike."""
        self.abandon_step()
        self._passes.begin_step()
        self.reducer.drain()
        if self.uneven is not None:
            self.uneven.mark_step_done()

    def beyond_allreduce(self) -> str | None:
        """Which extension needs more of Horovod than an allreduce of the gradients, if any."""
        if self.reducer.options.prefix:
            return public_name(self.reducer.settings)
        if self.preconditioner is not None:
            return type(self.preconditioner).__name__
        return None if self.server is None or self.server.alone else f"server={self.server.where!r}"

    # Hooks

    def _named_parameters(self) -> Iterator[NamedParameter]:
        optimizer = self._optimizer
        for index, group in enumerate(self.optimizer.param_groups):
            for number, parameter in enumerate(group["params"]):
                name = self._names.setdefault(parameter, f"allreduce.noname.{index}.{number}")
                yield NamedParameter(name, parameter, index, lambda: optimizer().param_groups)

    def _hook_parameters(self) -> None:
        """Hook parameters that require a gradient and are not hooked yet; plan their exchange."""
        hooks = self._hooks
        if not self.collectives.is_member or not any(
                parameter.requires_grad and parameter not in hooks
                for group in self.optimizer.param_groups for parameter in group["params"]):
            return
        fresh = [e for e in self._named_parameters()
                 if e.parameter.requires_grad and e.parameter not in hooks]
        check_real(() if self._is_untouched else fresh, self.method)
        for entry in fresh:
            p = entry.parameter
            hooks[p] = p.register_post_accumulate_grad_hook(self._make_hook(entry))
        self.reducer.register_parameters([*self.reducer.entries, *fresh])

    def _make_hook(self, entry: NamedParameter) -> Callable[[torch.Tensor], None]:
        ours = weakref.ref(self)

        def hook(parameter: torch.Tensor) -> None:
            self = ours()
            if self is None:
                return
            if self._is_untouched:
                self._passes.done[parameter] += 1
                return
            if self.state.reduced or self._reduced_gradients:
                self._leave_reduced_by_backward(parameter)
                if self.state.extended and not self._is_repeatable:
                    return  # an error, in synchronize() or step()
            if self.uneven is not None:
                self.uneven.gradient_ready(parameter, last=self._passes.done[parameter] + 1
                                           >= self.reducer.passes)
            self._passes.gradient_ready(entry)
            if self.closure is not None:
                self.closure.gradient_ready(parameter)

        return hook

    def remove_hooks(self) -> None:
        """Remove the hooks from the parameters; the optimizer is of no use afterwards."""
        self.abort_step()
        remove_hooks(self._hooks)

    def rebuild_for_world_size(self) -> None:
        """Take a new part after ranks have left or joined, on all ranks together."""
        self.abort_step()
        self.ranks = self.collectives.size
        self.reducer.met = None
        if self.server is not None:
            self.server.attach_optimizer(self.collectives, self.optimizer, self.reducer.options.groups,
                                         self._names)
        if self.preconditioner is not None:
            self.preconditioner.attach(self.collectives, self.optimizer)

    def _meet_ranks(self) -> None:
        """After an elastic change of the number of ranks, let the extensions take their new part."""
        before, self.ranks = self.ranks, self.collectives.size
        if before == self.ranks:
            return
        self.reducer.met = None
        self.reducer.on_ranks_lost(max(0, before - self.ranks))
        if self.server is not None and self.server.where != "replicated":
            raise RuntimeError(
                f"the number of ranks changed from {before} to {self.ranks}, and "
                f"server={self.server.where!r} left moments on ranks that are not all here; give the "
                "optimizer to hvd.elastic.TorchState, whose commits bring them together, or train with "
                'server="replicated"'
            )
        if self.preconditioner is not None:
            self.preconditioner.attach(self.collectives, self.optimizer)

"""An optimizer with extensions in its step: hooks and the step. Its state is in ``optimizer_state.py``.

The way of a gradient, in :class:`Wrapper`: backward hook -> reducer -> ``synchronize()``: reduced, then
preconditioned -> the user's clipping, if any -> ``step()``: the update, where ``server=`` says. What follows
what is decided in ``hvd_ext/step.py``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from hvd_ext.composition import public_name
from hvd_ext.step import WARNING, ReducedGradients, StepError, StepState
from hvd_ext.torch import handshake
from hvd_ext.torch.closures import ClosureReduction
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.hooks import check_real, let_go, remove_hooks
from hvd_ext.torch.passes import Passes
from hvd_ext.torch.reducers.base import Entry, Reducer
from hvd_ext.watch import WATCH

LIVE: weakref.WeakSet[Wrapper] = weakref.WeakSet()  # the wrappers of this process


class Wrapper:
    """What an extended optimizer has beyond the wrapped one, under ``optimizer._hvd_ext``.

    It and its hooks refer to the optimizer, and to each other, only weakly: an optimizer that is
    dropped is gone at once, and its hooks with it, before another one hooks the same parameters.
    """

    original: Callable[[], Any] = staticmethod(lambda: None)  # the optimizer that was wrapped
    grad_scaler: Any = None
    uneven: Any = None  # the block of hvd.uneven that the optimizer is in
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
        self._passes = Passes(reducer, alone=preconditioner is None and server is None)
        self._hooks: dict[torch.Tensor, Any] = {}
        self.ranks = self.collectives.size if self.collectives.included else 0
        self._watch()
        weakref.finalize(self, let_go, self._hooks, reducer)
        LIVE.add(self)
        if preconditioner is not None:
            preconditioner.attach(self.collectives, optimizer)
        if server is not None:
            server.attach(self.collectives, optimizer, reducer.options.groups, self._names)

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
            settle: ``step()`` is to take the reduced gradients as they are, also outside of
                ``skip_synchronize()``.
        """
        if not self.collectives.included:
            return
        with self._failing_together():
            if (settle and self.state.reduced and not self.state.extended) \
                    or not self.state.reduces_on_synchronize(self.method, repeatable=self._repeatable):
                self.state.settled |= settle
                return
            self._reduce()
            self.state.settled = settle
            if self.uneven is not None:
                self.uneven.touched = True

    def synchronize_for_step(self, synchronizes: bool) -> None:
        """What ``step()`` still has to reduce; ``synchronizes`` is False within ``skip_synchronize()``."""
        if not self.collectives.included:
            return
        with self._failing_together():
            if self.state.reduces_on_step(self.method, synchronizes=synchronizes, begun=self.begun(),
                                          repeatable=self._repeatable, ranks=self.collectives.size):
                if self.state.reduced:
                    warnings.warn(WARNING, stacklevel=4)
                self._reduce()
                if self.uneven is not None:
                    self.uneven.touched = False

    def _reduce(self) -> None:
        self.loaded = None
        self._watch()
        self._meet_ranks()
        self.reducer.freeze(self._passes.done)
        handshake.agree_on_optimizers(self, [one for one in LIVE if one._optimizer() is not None])
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
        self._passes.forget()
        if not self._repeatable and (good or self.reducer.staleness):
            self._reduced_gradients.remember((e.parameter, e.parameter.grad) for e in self.reducer.entries)
        WATCH.step_over()
        self.collectives.traffic.step()

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """After an error, which all ranks raise, nothing of the step is left and the next one may begin."""
        try:
            yield
        except BaseException as error:
            self._passes.forget()
            self.reducer.drain() if isinstance(error, StepError) else self.reducer.forget()
            if self.uneven is not None:
                self.uneven.forget()
            with suppress(Exception):  # the error that is being raised says more
                self._drop_pending()
            raise

    def update(self, inner_step: Callable[[], Any]) -> Any:
        """reduced -> applied: commit what is pending, then the wrapped optimizer's update where it belongs.

        A step that the ranks agreed to skip is not taken.
        """
        if not self.collectives.included:
            return inner_step()
        good, reduced = self.state.good, self.state.reduced
        self._drop_begun()
        if reduced:
            if self.uneven is not None:
                self.uneven.update_follows()
            self.state.reset()
            self._reduced_gradients.forget()
            self.reducer.commit()
            if self.preconditioner is not None:
                self.preconditioner.commit() if good else self.preconditioner.abandon()
        if not good:
            return None
        if self.server is None:
            return inner_step()
        result = self.server.step(inner_step)
        self.reducer.updated()
        self.collectives.traffic.step(same=True)
        return result

    def abandon(self) -> None:
        """reduced -> accumulating: the reduced gradients are thrown away, on all ranks alike."""
        if self.state.reduced:
            self._drop_step()
        self.state.reset()
        self._reduced_gradients.forget()

    def _drop_step(self) -> None:
        if self.uneven is not None:
            self.uneven.abandon_follows()
        self._drop_pending()
        self._drop_begun()

    def _drop_begun(self) -> None:
        """Drop what a backward pass after the reduction has sent, on all ranks alike."""
        if self.begun():
            self._passes.forget()
            self.reducer.drain()

    def skip(self) -> None:
        """reduced -> accumulating: as ``abandon()``, and a delayed gradient that was handed out is gone too.

        Raises:
            RuntimeError: gradients are on their way.
        """
        if self.begun():
            raise RuntimeError("skip_step() was called after loss.backward() and before "
                               "optimizer.synchronize(); synchronize first")
        if self.state.reduced:
            self.reducer.skip()
        self.abandon()

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
        if not self.collectives.included or not self.reducer.staleness:
            return
        if self.begun():
            raise RuntimeError("flush() was called between backward() and step(); call it after step()")
        self.abandon()
        kept = [(p, p.grad) for group in self.optimizer.param_groups for p in group["params"]]
        self.reducer.freeze({})
        try:
            with self._failing_together():
                good = self.reducer.flush()
            self.state.begin_reduced(good)
            if good and before_update is not None:
                before_update()
            self.update(inner_step)
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient

    @property
    def method(self) -> str:
        """The extension in the way of a second reduction, as a user wrote it."""
        if self.preconditioner is not None:
            return f"preconditioner={type(self.preconditioner).__name__}"
        return self.reducer.name if self.uneven is None else "hvd.uneven"

    @property
    def _repeatable(self) -> bool:
        return self.reducer.repeatable and self.preconditioner is None and self.uneven is None

    @property
    def _untouched(self) -> bool:
        return self.uneven is None and self._passes.untouched()

    def _leave_reduced_by_backward(self, parameter: torch.Tensor) -> None:
        """A backward pass has followed a reduction: on top of its gradients, or in place of them."""
        if self._reduced_gradients.includes(parameter, parameter.grad):
            self.state.extended = True
        elif self._repeatable:
            self.state.extended = self.state.reduced
        elif self.state.reduced and not self.state.extended:
            self._drop_step()  # a backward pass may still add to others of them

    def gather_gradients(self) -> None:
        """Bring reduced gradients that only their owners have to all ranks."""
        if self.collectives.included and self.reducer.partial:
            if self.uneven is not None:
                self.uneven.gather_follows()
            self.reducer.gather_gradients()

    @contextmanager
    def exact_weights(self) -> Iterator[None]:
        """Let the parameters hold the owners' exact weights; a collective.

        Raises:
            RuntimeError: a step has begun.
        """
        if self.server is None or not self.collectives.included:
            yield
            return
        if self.begun() or self.state.reduced:
            raise RuntimeError("exact_weights() was entered between backward() and step(); enter it after "
                               "step()")
        with self.server.exact_weights():
            yield

    def begun(self) -> bool:
        """Whether gradients of this step are on their way."""
        return bool(self._passes.done) and not self._untouched

    def has_all_gradients(self) -> bool:
        """Whether every parameter has its gradient of this step's last backward pass."""
        return all(self._passes.done[entry.parameter] >= self.reducer.passes
                   for entry in self.reducer.entries if entry.parameter.requires_grad)

    @contextmanager
    def reducing_in_closure(self, synchronizes: bool) -> Iterator[None]:
        """While ``step()`` evaluates a closure; ``synchronizes`` is False within ``skip_synchronize()``."""
        if synchronizes and self.collectives.included:
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
        self.forget()
        self.reducer.passes = passes

    def forget(self) -> None:
        """Drop what was begun for this step, on all ranks alike."""
        self.abandon()
        self._passes.forget()
        self.reducer.drain()
        if self.uneven is not None:
            self.uneven.step_over()

    def beyond_allreduce(self) -> str | None:
        """Which extension needs more of Horovod than an allreduce of the gradients, if any."""
        if self.reducer.options.prefix:
            return public_name(self.reducer.settings)
        if self.preconditioner is not None:
            return type(self.preconditioner).__name__
        return None if self.server is None or self.server.alone else f"server={self.server.where!r}"

    # Hooks

    def _entries(self) -> Iterator[Entry]:
        optimizer = self._optimizer
        for index, group in enumerate(self.optimizer.param_groups):
            for number, parameter in enumerate(group["params"]):
                name = self._names.setdefault(parameter, f"allreduce.noname.{index}.{number}")
                yield Entry(name, parameter, index, lambda: optimizer().param_groups)

    def _watch(self) -> None:
        """Hook parameters that require a gradient and are not hooked yet; plan their exchange."""
        hooks = self._hooks
        if not self.collectives.included or not any(
                parameter.requires_grad and parameter not in hooks
                for group in self.optimizer.param_groups for parameter in group["params"]):
            return
        fresh = [e for e in self._entries() if e.parameter.requires_grad and e.parameter not in hooks]
        check_real(() if self._untouched else fresh, self.method)
        for entry in fresh:
            hooks[entry.parameter] = entry.parameter.register_post_accumulate_grad_hook(self._hook(entry))
        self.reducer.build([*self.reducer.entries, *fresh])

    def _hook(self, entry: Entry) -> Callable[[torch.Tensor], None]:
        ours = weakref.ref(self)

        def hook(parameter: torch.Tensor) -> None:
            self = ours()
            if self is None:
                return
            if self._untouched:
                self._passes.done[parameter] += 1
                return
            if self.state.reduced or self._reduced_gradients:
                self._leave_reduced_by_backward(parameter)
                if self.state.extended and not self._repeatable:
                    return  # an error, in synchronize() or step()
            if self.uneven is not None:
                self.uneven.gradient_ready(parameter, last=self._passes.done[parameter] + 1
                                           >= self.reducer.passes)
            self._passes.gradient_ready(entry)
            if self.closure is not None:
                self.closure.gradient_ready(parameter)

        return hook

    def unhook(self) -> None:
        """Remove the hooks from the parameters; the optimizer is of no use afterwards."""
        self.forget()
        remove_hooks(self._hooks)

    def regroup(self) -> None:
        """Take a new part after ranks have left or joined, on all ranks together."""
        self.forget()
        self.ranks = self.collectives.size
        self.reducer.met = None
        if self.server is not None:
            self.server.attach(self.collectives, self.optimizer, self.reducer.options.groups, self._names)
        if self.preconditioner is not None:
            self.preconditioner.attach(self.collectives, self.optimizer)

    def _meet_ranks(self) -> None:
        """After an elastic change of the number of ranks, let the extensions take their new part."""
        before, self.ranks = self.ranks, self.collectives.size
        if before == self.ranks:
            return
        self.reducer.met = None
        self.reducer.lost(max(0, before - self.ranks))
        if self.server is not None and self.server.where != "replicated":
            raise RuntimeError(
                f"the number of ranks changed from {before} to {self.ranks}, and "
                f"server={self.server.where!r} left moments on ranks that are not all here; give the "
                "optimizer to hvd.elastic.TorchState, whose commits bring them together, or train with "
                'server="replicated"'
            )
        if self.preconditioner is not None:
            self.preconditioner.attach(self.collectives, self.optimizer)

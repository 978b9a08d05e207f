"""An optimizer with extensions in its step: hooks and the step. Its state is in ``optimizer_state.py``.

The way of a gradient, in :class:`Wrapper`: backward hook -> reducer -> ``synchronize()``: reduced, then
preconditioned -> the user's clipping, if any -> ``step()``: the update, where ``server=`` says.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hvd_ext.composition import public_name
from hvd_ext.names import checked_names
from hvd_ext.torch.collectives import Collectives
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

    def __init__(self, optimizer: torch.optim.Optimizer, named_parameters: Any, reducer: Reducer,
                 preconditioner: Any, server: Any) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.reducer = reducer
        self.preconditioner = preconditioner
        self.server = server
        self._names = checked_names(optimizer.param_groups, named_parameters)
        self._good = True  # the step that synchronize() began may be taken
        self.reduced = False  # hvd.clip_grad_norm_ has reduced this step's gradients
        self._passes = Passes(reducer)
        self._hooks: dict[torch.Tensor, Any] = {}
        self._ranks = self.collectives.size if self.collectives.included else 0
        self._watch()
        weakref.finalize(self, _remove, self._hooks)
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

    # The step

    def synchronize(self) -> None:
        """First half of a step: reduce, then precondition."""
        self._good = True
        if not self.collectives.included:
            return
        try:
            self._watch()
            self._meet_ranks()
            self.reducer.meet(f"preconditioner: {type(self.preconditioner).__name__}",
                              *(["server: None"] if self.server is None else self.server.settings.lines()))
            if self.preconditioner is not None:
                self.preconditioner.before_reduce()
            if self.uneven is not None:
                self.uneven.before_reduce()
            self._good = self.reducer.finish()
            if self.uneven is not None:
                self.uneven.after_reduce()
                self.uneven.step_over()
            if self._good and self.preconditioner is not None:
                self.preconditioner.precondition()
        except BaseException:
            self.reducer.forget()
            if self.uneven is not None:
                self.uneven.forget()
            raise
        finally:
            self._passes.forget()
        WATCH.step_over()
        self.collectives.traffic.step()

    def reduce_once(self) -> None:
        """Reduce this step's gradients, unless that has been done, and have ``step()`` not do it again."""
        if not self.reduced and not self.optimizer._synchronized:  # type: ignore[attr-defined]
            self.synchronize()
        self.reduced = True

    def gather_gradients(self) -> None:
        """Bring reduced gradients that only their owners have to all ranks."""
        if self.collectives.included:
            self.reducer.gather_gradients()

    def update(self, inner_step: Callable[[], Any]) -> Any:
        """Second half of a step: the wrapped optimizer's update, on the ranks where it belongs.

        A step that the ranks agreed to skip is not taken.
        """
        self.reduced = False
        if not self._good:
            return None
        if self.server is None or not self.collectives.included:
            return inner_step()
        result = self.server.step(inner_step)
        self.reducer.updated()
        self.collectives.traffic.step(same=True)
        return result

    def flush(self, inner_step: Callable[[], Any]) -> None:
        """Take the update of gradients that are late, if there is one.

        Raises:
            RuntimeError: a step has begun.
        """
        if not self.collectives.included or not self.reducer.staleness:
            return
        if self.begun():
            raise RuntimeError("flush() was called between backward() and step(); call it after step()")
        self._good = self.reducer.flush()
        self.update(inner_step)

    @contextmanager
    def exact_weights(self) -> Iterator[None]:
        """Let the parameters hold the owners' exact weights; a collective.

        Raises:
            RuntimeError: a step has begun.
        """
        if self.server is None or not self.collectives.included:
            yield
            return
        if self.begun():
            raise RuntimeError("exact_weights() was entered between backward() and step(); enter it after "
                               "step()")
        with self.server.exact_weights():
            yield

    def begun(self) -> bool:
        """Whether gradients of this step are on their way."""
        return bool(self._passes.done)

    def set_passes(self, passes: int) -> None:
        """Change the number of backward passes per step; between steps only."""
        self.forget()
        self.reducer.passes = passes

    def forget(self) -> None:
        """Drop what was begun for this step, on all ranks alike."""
        self.reduced = False
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
        if not any(parameter.requires_grad and parameter not in hooks
                   for group in self.optimizer.param_groups for parameter in group["params"]):
            return
        fresh = [entry for entry in self._entries()
                 if entry.parameter.requires_grad and entry.parameter not in hooks]
        if not self.collectives.included:
            return
        for entry in fresh:
            self._hooks[entry.parameter] = (
                entry.parameter.register_post_accumulate_grad_hook(self._hook(entry)))
        self.reducer.build([*self.reducer.entries, *fresh])

    def _hook(self, entry: Entry) -> Callable[[torch.Tensor], None]:
        ours = weakref.ref(self)

        def hook(parameter: torch.Tensor) -> None:
            self = ours()
            if self is None:
                return
            if self.uneven is not None:
                last = self._passes.done[parameter] + 1 >= self.reducer.passes
                self.uneven.gradient_ready(parameter, last=last)
            self.reduced = False
            self._passes.gradient_ready(entry)

        return hook

    def unhook(self) -> None:
        """Remove the hooks from the parameters; the optimizer is of no use afterwards."""
        self.forget()
        _remove(self._hooks)

    def regroup(self) -> None:
        """Take a new part after ranks have left or joined, on all ranks together."""
        self.forget()
        self._ranks = self.collectives.size
        self.reducer.met = None
        if self.server is not None:
            self.server.attach(self.collectives, self.optimizer, self.reducer.options.groups, self._names)
        if self.preconditioner is not None:
            self.preconditioner.attach(self.collectives, self.optimizer)

    def _meet_ranks(self) -> None:
        """After an elastic change of the number of ranks, let the extensions take their new part."""
        before, self._ranks = self._ranks, self.collectives.size
        if before == self._ranks:
            return
        self.reducer.met = None
        self.reducer.lost(max(0, before - self._ranks))
        if self.server is not None and self.server.where != "replicated":
            raise RuntimeError(
                f"the number of ranks changed from {before} to {self._ranks}, and "
                f"server={self.server.where!r} left moments on ranks that are not all here; give the "
                "optimizer to hvd.elastic.TorchState, whose commits bring them together, or train with "
                'server="replicated"'
            )
        if self.preconditioner is not None:
            self.preconditioner.attach(self.collectives, self.optimizer)

    # Figures

    def report(self) -> dict[str, Any]:
        """Figures of the last step: bytes by kind, and those of each extension in use."""
        traffic = self.collectives.traffic
        figures = {"sent": dict(traffic.last_sent), "received": dict(traffic.last_received),
                   **self.reducer.report()}
        for name, extension in (("preconditioner", self.preconditioner), ("server", self.server)):
            if extension is not None:
                figures[name] = extension.report()
        return figures


def _remove(hooks: dict[torch.Tensor, Any]) -> None:
    for handle in hooks.values():
        handle.remove()

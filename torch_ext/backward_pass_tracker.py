"""Which backward pass of a step a gradient is of."""

from __future__ import annotations

import os
import sys
import weakref
from collections import Counter
from types import FrameType

import torch

from hvd_ext.torch.reducers.base import NamedParameter, Reducer


class BackwardPassTracker:
    """Counts the backward passes of a step and hands each gradient to the reducer with its pass.

    Where every pass is exchanged by itself (``reducer.parts`` above 1), gradients belong together by
    the call of ``backward()`` that made them, also where a parameter has none in some pass. A call
    that reaches only parameters without a gradient in the current pass, such as the second of two
    losses with parameters of their own, belongs to that pass still. While that is not known, its
    gradients are held back.
    """

    def __init__(self, reducer: Reducer, *, alone: bool = False) -> None:
        self.reducer = reducer
        self._alone = alone  # nothing but the reducer is in the way of a gradient
        self.done: Counter[torch.Tensor] = Counter()
        self.reported = False  # whether the reducer has got gradients of this step
        self._graph_task = -1  # autograd's number of the call that gave the last gradient
        self._nested = False  # whether that call runs within another one
        self._from_nested: set[torch.Tensor] = set()  # have had a gradient of such a call in this step
        self._number = 0  # the current pass; 0 before the first
        self._reached: set[torch.Tensor] = set()  # by the current pass
        self._inside = False  # a call of backward() that autograd has not reported over
        self._held: list[NamedParameter] | None = None  # of a call whose pass is not known yet

    def is_untouched(self) -> bool:
        """Whether gradients stay as autograd leaves them: plain reduction on one rank, as in Horovod."""
        return (self._alone and self.reducer.untouched and self.reducer.collectives.size == 1
                and os.environ.get("HOROVOD_ELASTIC") != "1")

    def begin_step(self) -> None:
        """Begin a step; what was counted and held back of the last one is dropped."""
        self.done.clear()
        self._from_nested.clear()
        self.reported = False
        self._number = 0
        self._reached.clear()
        self._inside, self._held = False, None

    def gradient_ready(self, entry: NamedParameter) -> None:
        """Take note of a gradient that a backward pass has just completed.

        Raises:
            AssertionError: it is one more than ``backward_passes_per_step``.
        """
        gradient = entry.parameter.grad
        if gradient is not None and gradient.requires_grad:  # backward(create_graph=True)
            entry.parameter.grad = gradient.detach()
        self.done[entry.parameter] += 1
        self.reported = True
        self.reducer.frozen.discard(entry)  # of the step before
        task = torch._C._current_graph_task_id()
        if task != self._graph_task:
            self._graph_task, self._nested = task, _is_nested()
        if self._nested:
            self._from_nested.add(entry.parameter)
        if self.done[entry.parameter] > self.reducer.passes:
            self._raise_too_many(entry)
        if self.reducer.parts == 1:
            self.reducer.gradient_ready(entry, self.done[entry.parameter], 1)
            return
        self._enter_pass(entry)
        if self._held is None:
            self._give_gradient(entry)
        elif entry.parameter in self._reached:
            held, self._held = self._held, None
            self._next_pass(entry)
            for one in [*held, entry]:
                self._give_gradient(one)
        elif self._number == self.reducer.passes:  # no other pass can follow
            self._give_gradient(entry)
        else:
            self._held.append(entry)

    def _enter_pass(self, entry: NamedParameter) -> None:
        if self._inside:
            return
        ours = weakref.ref(self)

        def over() -> None:
            self = ours()
            if self is not None:
                self._leave_pass()

        torch.autograd.Variable._execution_engine.queue_callback(over)  # type: ignore[attr-defined]
        self._inside = True
        if self._number:
            self._held = []
        else:
            self._next_pass(entry)

    def _leave_pass(self) -> None:
        held, self._held, self._inside = self._held or (), None, False
        for entry in held:
            self._give_gradient(entry)

    def _next_pass(self, entry: NamedParameter) -> None:
        if self._number == self.reducer.passes:
            self._raise_too_many(entry)
        self._number += 1
        self._reached.clear()

    def _give_gradient(self, entry: NamedParameter) -> None:
        self._reached.add(entry.parameter)
        self.reducer.gradient_ready(entry, self.done[entry.parameter], self._number)

    def _raise_too_many(self, entry: NamedParameter) -> None:
        nested = entry.parameter in self._from_nested
        raise AssertionError(
            "Gradients were computed more than backward_passes_per_step times before call to step(). "
            + (f"{entry.name} is under torch.utils.checkpoint with use_reentrant=True, which runs a backward "
               "pass within the backward pass for each use of a layer. If the layer is used more than once, "
               "pass use_reentrant=False to checkpoint(); otherwise increase" if nested else "Increase")
            + " backward_passes_per_step to accumulate gradients locally.")


def _is_nested() -> bool:
    """Whether a backward pass runs within another one's, which reentrant checkpointing starts."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "backward" and code.co_argcount and isinstance(
                frame.f_locals.get(code.co_varnames[0]), torch.autograd.function.FunctionCtx):
            return True
        frame = frame.f_back
    return False

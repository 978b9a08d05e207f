"""How gradients come together: the interface of a reducer, and the plain one.

A reducer is told of every gradient as the backward pass yields it, starts its collectives then,
and hands back reduced gradients when the step needs them. ``optimizer.py`` owns the hooks.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import horovod.torch as horovod
import torch

from hvd_ext.torch.collectives import Collectives, Handle


@dataclass(frozen=True, eq=False)
class Entry:
    """A parameter under its name, with the number and the dict of its parameter group."""

    name: str
    parameter: torch.nn.Parameter
    group_index: int
    group: dict[str, Any]


class Reducer(abc.ABC):
    """Turns each rank's local gradients into the reduced gradient, the same bits on every rank."""

    def __init__(self, collectives: Collectives, passes: int) -> None:
        self.collectives = collectives
        self.passes = passes
        self.entries: list[Entry] = []

    def set_entries(self, entries: Sequence[Entry]) -> None:
        """Take the parameters whose gradients are to be reduced; called again when they change."""
        self.entries = list(entries)

    @abc.abstractmethod
    def gradient_ready(self, entry: Entry, passes_done: int) -> None:
        """A backward pass has finished ``entry.parameter.grad``; the ``passes_done``-th this step."""

    @abc.abstractmethod
    def finish(self) -> bool:
        """Wait for the reduced gradients and put them into ``parameter.grad``.

        Returns whether the step may be taken; False, on all ranks alike, when it must be skipped.
        """

    @abc.abstractmethod
    def forget(self) -> None:
        """Drop what was begun for this step (after an error, or when a state is loaded)."""

    def state_dict(self) -> dict[str, Any]:
        """What this rank keeps between steps. Empty when it keeps nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  (most keep nothing)
        """Take back what ``state_dict()`` gave, bit for bit."""

    def reset_state(self) -> None:  # noqa: B027
        """Start the state anew."""

    def report(self) -> dict[str, Any]:
        """Figures of the last step, to be read by people and programs."""
        return {}


class PlainReducer(Reducer):
    """Horovod's own reduction, tensor by tensor: for steps that extend only what comes after it."""

    def __init__(self, collectives: Collectives, passes: int, *, op: Any, compression: Any,
                 gradient_predivide_factor: float, groups: Any, sparse_as_dense: bool) -> None:
        super().__init__(collectives, passes)
        self.op = op
        self.compression = compression
        self.sparse_as_dense = sparse_as_dense
        self._scale: dict[str, float] = {}
        if op == horovod.Average and gradient_predivide_factor != 1.0:
            self._scale = {"prescale_factor": 1.0 / gradient_predivide_factor,
                           "postscale_factor": gradient_predivide_factor}
        # Explicit groups only tell Horovod what to fuse; the result is the same without them.
        del groups
        self._started: dict[Entry, tuple[Any, Any]] = {}

    def gradient_ready(self, entry: Entry, passes_done: int) -> None:
        if passes_done == self.passes:
            self._start(entry)

    def _start(self, entry: Entry) -> None:
        parameter = entry.parameter
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad
        if gradient.is_sparse and not self.sparse_as_dense:
            handle = horovod.sparse_allreduce_async(
                gradient, name=entry.name, op=self.op, process_set=self.collectives.process_set
            )
            self._started[entry] = (handle, None)
            return
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        sent, context = self.compression.compress(gradient)
        handle = self.collectives.allreduce_async_(sent, entry.name, op=self.op, **self._scale)
        self._started[entry] = (handle, context)

    def finish(self) -> bool:
        for entry in self.entries:
            if entry not in self._started:
                self._start(entry)
        started, self._started = self._started, {}
        for entry, (handle, context) in started.items():
            gradient = entry.parameter.grad
            assert gradient is not None
            reduced = handle.wait() if isinstance(handle, Handle) else handle()
            if gradient.is_sparse:
                reduced = reduced if reduced.is_sparse else reduced.to_sparse()
                gradient.zero_().add_(reduced)
            else:
                gradient.set_(self.compression.decompress(reduced, context))
        return True

    def forget(self) -> None:
        self._started = {}

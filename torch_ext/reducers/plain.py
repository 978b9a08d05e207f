"""Horovod's own reduction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.torch as horovod
import torch

from hvd_ext.buckets import split_groups
from hvd_ext.options import Options, Plain
from hvd_ext.torch.collectives import SHARED_ERRORS, Collectives, Handle, abandon
from hvd_ext.torch.mpi_ops import sparse_allreduce_async
from hvd_ext.torch.reducers.base import Entry, Reducer
from hvd_ext.watch import WATCH


class PlainReducer(Reducer):
    """Reduces gradient by gradient, or group by group with ``groups=``, as Horovod does."""

    STATE = ()

    def __init__(self, collectives: Collectives, settings: Plain, options: Options) -> None:
        super().__init__(collectives, settings, options)
        self._scale = settings.scale
        self._group: dict[Entry, list[Entry]] = {}
        self._ready: set[Entry] = set()
        self._started: list[tuple[list[Entry], Any, list[Any]]] = []
        self._sparse: set[Entry] = set()  # whose gradients have been sparse

    repeatable = True  # as Horovod does it

    @property
    def averages(self) -> bool:
        return bool(self.settings.op == horovod.Average)

    def build(self, entries: Sequence[Entry]) -> None:
        super().build(entries)
        groups = split_groups(self.options.groups, [entry.parameter for entry in entries]) or []
        self._group = {entries[number]: [entries[member] for member in group]
                       for group in groups for number in group}

    def gradient_ready(self, entry: Entry, passes_done: int, pass_number: int) -> None:
        if passes_done == self.passes:
            self._take(entry)

    def _take(self, entry: Entry) -> None:
        """Start the gradient's collective, or its group's once all of the group are there."""
        parameter = entry.parameter
        if parameter.grad is None:
            zeros = torch.zeros_like(parameter)
            parameter.grad = zeros.to_sparse(1) if entry in self._sparse else zeros
        elif parameter.grad.is_sparse:
            self._sparse.add(entry)
        self._ready.add(entry)
        group = self._group.get(entry, [entry])
        if parameter.grad.is_sparse and not self.options.sparse_as_dense:
            handle = sparse_allreduce_async(parameter.grad, name=_name(entry), op=self.settings.op,
                                            process_set=self.collectives.process_set)
            self._started.append(([entry], handle, []))
        elif entry not in self._group and not parameter.grad.is_sparse:
            sent, context = self.settings.compression.compress(parameter.grad)
            handle = self.collectives.allreduce_async_(sent, _name(entry), op=self.settings.op,
                                                       **self._scale)
            self._started.append(([entry], handle, [context]))
        elif all(member in self._ready for member in group):
            self._start([one for one in group if self.options.sparse_as_dense
                         or not one.parameter.grad.is_sparse])

    def _start(self, group: list[Entry]) -> None:
        gradients = [one.parameter.grad.to_dense() if one.parameter.grad.is_sparse
                     else one.parameter.grad for one in group]
        sent, contexts = zip(*map(self.settings.compression.compress, gradients), strict=True)
        together: dict[Any, list[int]] = {}  # Horovod fuses tensors of one dtype and device
        for number, tensor in enumerate(sent):
            together.setdefault((tensor.dtype, tensor.device), []).append(number)
        for numbers in together.values():
            handle = self.collectives.grouped_allreduce_async_(
                [sent[number] for number in numbers], _name(group[numbers[0]]),
                op=self.settings.op, **self._scale)
            self._started.append(([group[number] for number in numbers], handle,
                                  [contexts[number] for number in numbers]))

    def start_all(self) -> None:
        for entry in self.entries:
            if entry not in self._ready:
                self._take(entry)

    def finish(self) -> bool:
        self.start_all()
        started, self._started = self._started, []
        self.forget()
        for group, handle, contexts in started:
            if not contexts:
                gradient = group[0].parameter.grad
                WATCH.begin(group[0].name)
                try:
                    reduced = handle()
                finally:
                    WATCH.end()
                reduced = reduced if reduced.is_sparse else reduced.to_sparse()
                gradient.zero_().add_(reduced)
                continue
            for entry, reduced, context in zip(group, handle.wait_all(), contexts, strict=True):
                dense = self.settings.compression.decompress(reduced, context)
                if entry.parameter.grad.is_sparse:
                    entry.parameter.grad.zero_().add_(dense.to_sparse())
                elif dense is not entry.parameter.grad:
                    entry.parameter.grad.set_(dense)
        return True

    def under_way(self) -> list[Handle]:
        return [handle for _, handle, _ in self._started if isinstance(handle, Handle)]

    def forget(self) -> None:
        abandon(self.under_way())
        self._started = []
        self._ready = set()


def _name(entry: Entry) -> str:
    """The name of the entry's collective: another one after an error, whose messages may lie about."""
    return f"{entry.name}.after{len(SHARED_ERRORS)}" if SHARED_ERRORS else entry.name

"""Horovod's own reduction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.torch as horovod
import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_ext.consistency.fingerprint import Fingerprint
from hvd_ext.consistency.scopes import SharedName
from hvd_ext.reducers.buckets import split_groups
from hvd_ext.reducers.options import DenseReduction, ReductionOptions
from hvd_ext.torch.collectives import Collectives, Handle, keep_alive_until_done
from hvd_ext.torch.mpi_ops import sparse_allreduce_async
from hvd_ext.torch.reducers.base import NamedParameter, Reducer
from hvd_ext.torch.reducers.frozen import frozen_token
from hvd_ext.torch.reducers.gradient_layouts import Layouts
from hvd_ext.watchdog.watchdog import WATCH

LAYOUTS = "hvd_ext/layouts"  # a collective's name


class PlainReducer(Reducer):
    """Reduces gradient by gradient, or group by group with ``groups=``, as Horovod does."""

    STATE = ()

    def __init__(self, collectives: Collectives, settings: DenseReduction, options: ReductionOptions) -> None:
        super().__init__(collectives, settings, options)
        self._scale = settings.scale
        self._group: dict[NamedParameter, list[NamedParameter]] = {}
        self._ready: set[NamedParameter] = set()
        self._started: list[tuple[list[NamedParameter], Any, list[Any]]] = []
        self._sparse: set[NamedParameter] = set()  # whose gradients have been sparse
        self.layouts = Layouts()
        self._names: dict[NamedParameter, SharedName] = {}

    untouched = True

    @property
    def repeatable(self) -> bool:
        """As Horovod does it, except for a sum, which would be added up once more."""
        return bool(self.settings.op != horovod.Sum) or self.collectives.size == 1

    @property
    def averages(self) -> bool:
        return bool(self.settings.op == horovod.Average)

    def register_parameters(self, entries: Sequence[NamedParameter]) -> None:
        """Parameters that join later make groups of their own: the others' may be on their way."""
        before, staying = set(self.entries), set(entries)
        super().register_parameters(entries)
        scope = self.collectives.scope
        given = [one.name for one in entries]
        names = [SharedName(name) for name in given] if scope is None else scope.keep_all_whole(given)
        self._names = dict(zip(entries, names, strict=True))
        apart = {one for group in self._group.values() if not staying.issuperset(group) for one in group}
        self._group = {entry: group for entry, group in self._group.items() if entry not in apart}
        added = [entry for entry in entries if entry not in before or entry in apart]
        groups = split_groups(self.options.groups, [entry.parameter for entry in added]) or []
        self._group |= {added[number]: [added[member] for member in group]
                        for group in groups for number in group}

    def after_agreement(self) -> None:
        self.layouts.restart(self)
        self._ask_layouts()

    def _ask_layouts(self) -> None:
        """Once all gradients are there, whichever optimizer's step comes first on the ranks."""
        if len(self._ready) == len(self.entries):
            self.layouts.start_exchange(self, LAYOUTS)

    def gradient_ready(self, entry: NamedParameter, passes_done: int, pass_number: int) -> None:
        if passes_done == self.passes:
            self._take_gradient(entry)
            self._ask_layouts()

    def _take_gradient(self, entry: NamedParameter) -> None:
        """Start the gradient's collective, or its group's once all of the group are there."""
        self._ready.add(entry)
        gradient = self._gradient_to_send(entry)
        group = self._group.get(entry, [entry])
        if gradient is not None and gradient.is_sparse and not self.options.sparse_as_dense:
            handle = sparse_allreduce_async(gradient, name=self._collective_name(entry), op=self.settings.op,
                                            process_set=self.collectives.process_set)
            self._started.append(([entry], handle, []))
        elif entry not in self._group and gradient is not None and not gradient.is_sparse:
            sent, context = self.settings.compression.compress(gradient)
            handle = self.collectives.allreduce_async_(sent, self._collective_name(entry),
                                                       op=self.settings.op,
                                                       **self._scale)
            self._started.append(([entry], handle, [context]))
        elif all(member in self._ready for member in group):
            gradients = {one: self._gradient_to_send(one) for one in group}
            self._start_bucket({one: gradient.to_dense() if gradient.is_sparse else gradient
                                for one, gradient in gradients.items() if gradient is not None
                                and (self.options.sparse_as_dense or not gradient.is_sparse)})

    def _gradient_to_send(self, entry: NamedParameter) -> torch.Tensor | None:
        """What travels for an entry; None on one rank, where gradients stay as they are, as in Horovod."""
        parameter = entry.parameter
        if self.collectives.size == 1:
            return None
        if parameter.grad is None:
            if entry in self.frozen:
                return frozen_token(parameter)
            zeros = torch.zeros_like(parameter)
            sparse = entry in self._sparse or self.options.sparse_only
            parameter.grad = zeros.to_sparse(1) if sparse else zeros
        elif parameter.grad is not None and parameter.grad.is_sparse:
            self._sparse.add(entry)
        return parameter.grad

    def _start_bucket(self, gradients: dict[NamedParameter, torch.Tensor]) -> None:
        if not gradients:
            return
        group = list(gradients)
        sent, contexts = zip(*map(self.settings.compression.compress, gradients.values()), strict=True)
        together: dict[Any, list[int]] = {}  # Horovod fuses tensors of one dtype and device
        for number, tensor in enumerate(sent):
            together.setdefault((tensor.dtype, tensor.device), []).append(number)
        for numbers in together.values():
            handle = self.collectives.grouped_allreduce_async_(
                [sent[number] for number in numbers], self._collective_name(group[numbers[0]]),
                op=self.settings.op, **self._scale)
            self._started.append(([group[number] for number in numbers], handle,
                                  [contexts[number] for number in numbers]))

    def start_remaining(self) -> None:
        for entry in self.entries:
            if entry not in self._ready:
                self._take_gradient(entry)

    def finish(self) -> bool:
        if self.entries:
            self._sparse |= self.layouts.learn_sparse(self, LAYOUTS)
        self.start_remaining()
        for group, handle, contexts in self._started:
            if not contexts:
                gradient = group[0].parameter.grad
                WATCH.start_wait(group[0].name)
                try:
                    reduced = handle()
                finally:
                    WATCH.end_wait()
                reduced = reduced if reduced.is_sparse else reduced.to_sparse()
                gradient.zero_().add_(reduced)
                continue
            for entry, reduced, context in zip(group, self._wait_group(group, handle), contexts, strict=True):
                if entry in self.frozen:
                    continue
                dense = self.settings.compression.decompress(reduced, context)
                if entry.parameter.grad.is_sparse:
                    entry.parameter.grad.zero_().add_(dense.to_sparse())
                elif dense is not entry.parameter.grad:
                    entry.parameter.grad.set_(dense)
        self._started, self._ready = [], set()
        return True

    def _wait_group(self, group: list[NamedParameter], handle: Handle) -> list[torch.Tensor]:
        try:
            return handle.wait_all()
        except HorovodInternalError as error:
            if "Mismatched" not in str(error):
                raise
            raise self.collectives.errors.raise_together(
                f"{', '.join(entry.name for entry in group[:4])}: trained on some ranks and frozen on "
                "others, or of another shape or dtype there; set requires_grad alike on all ranks, before "
                "the same step") from error

    def pending_handles(self) -> list[Handle]:
        started = [handle for _, handle, _ in self._started if isinstance(handle, Handle)]
        return started + self.layouts.pending_handles()

    def abort_step(self) -> None:
        keep_alive_until_done(self.pending_handles())
        self._started = []
        self._ready = set()
        self.layouts.abort_step()

    def _collective_name(self, entry: NamedParameter) -> str:
        """The name of the entry's collective: another one after an error, whose messages may lie about."""
        return SharedName(self._names[entry] + self.collectives.errors.suffix)

    def build_fingerprint(self) -> Fingerprint:
        others = [f"{one.name} travels as {name}" for one, name in self._names.items() if name != one.name]
        return Fingerprint((*super().build_fingerprint().lines, *others))

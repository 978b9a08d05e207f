"""Reducers whose gradients travel in flat buckets, each started as soon as its gradients are there.

A subclass says how one bucket is exchanged (``start``) and what becomes of the answers
(``complete``); planning, filling, agreement of the ranks and handing back are here.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hvd_ext.consistency.fingerprint import Fingerprint, mismatch_message
from hvd_ext.consistency.wire import pack_row, unpack_rows
from hvd_ext.reducers import registry
from hvd_ext.reducers.buckets import (
    DEFAULT_BUCKET_BYTES,
    Bucket,
    BucketKey,
    TensorSlice,
    TensorSpec,
    plan_buckets,
    split_groups,
)
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.state import LOST_RESIDUALS, STEPS, Part
from hvd_ext.torch.collectives import Collectives, Handle, keep_alive_until_done
from hvd_ext.torch.reducers.base import NamedParameter, Reducer
from hvd_ext.torch.reducers.declared_state import state_tensors
from hvd_ext.torch.reducers.frozen import hold_frozen
from hvd_ext.torch.reducers.gradient_layouts import Layouts

Started = Mapping[tuple[int, int], Any]
"""What ``start`` returned, by (number of the bucket, part of the step)."""


class PendingAgreement:
    """A few numbers of each rank and what it was given, on their way to all."""

    def __init__(self, collectives: Collectives, number: int, values: Sequence[float], name: str) -> None:
        row = torch.from_numpy(pack_row(number, values))
        self._found = unpack_rows(row.numpy()) if collectives.size == 1 else None
        self._handle = None if self._found else collectives.allgather_async(row, name, kind="agreement")

    def done(self) -> bool:
        """Whether ``read()`` would not wait."""
        return self._handle is None or self._handle.is_done()

    def read(self) -> tuple[list[int], list[list[float]]]:
        """Every rank's fingerprint and numbers, by rank."""
        if self._found is None:
            assert self._handle is not None
            handle, self._handle = self._handle, None
            self._found = unpack_rows(handle.wait().numpy())
        return self._found

    def pending_handles(self) -> list[Handle]:
        """The collective, until it has been waited for."""
        return [] if self._handle is None else [self._handle]


class BucketReducer(Reducer):
    """Plans buckets, sees when one is complete, and makes the ranks agree before any result is used.

    Once a parameter is in the plan it stays there; without a gradient it takes part with zeros.
    Parameters that come later (``add_param_group``, unfreezing) get buckets of their own, so that
    state kept for earlier buckets stays valid. A step has ``parts`` parts, each an exchange of its
    own: one, unless every micro-batch is.
    """

    def __init__(self, collectives: Collectives, settings: Any, options: ReductionOptions) -> None:
        super().__init__(collectives, settings, options)
        self.prefix = options.prefix
        self.bucket_bytes = getattr(settings, "bucket_bytes", DEFAULT_BUCKET_BYTES)
        self.steps = 0
        self.buckets: list[Bucket] = []
        self.specs: list[TensorSpec] = []
        self._place: dict[NamedParameter, tuple[Bucket, TensorSlice]] = {}
        self._buffers: dict[tuple[int, int], torch.Tensor] = {}
        self._filled: dict[tuple[int, int], set[NamedParameter]] = {}
        self._started: dict[tuple[int, int], Any] = {}
        self._back: dict[int, Any] = {}  # by bucket: the second half of an exchange that has two
        self._asked: PendingAgreement | None = None  # about the step under way
        self._sparse: set[NamedParameter] = set()
        self._layouts = Layouts()
        self._devices: list[torch.device] = []
        self._fingerprint: tuple[tuple[Any, ...], Fingerprint] | None = None
        self._usable = False  # a step is reduced, may be taken, and is not yet
        self._staged: dict[str, dict[int, torch.Tensor]] = {}  # by part and bucket, if that step is taken
        self._free_state: dict[str, dict[int, torch.Tensor]] = {}  # memory for the next step's
        self._scale_now: float | None = None  # the loss scale of the step under way
        self._scale_reduced = 1.0  # and of the step that is reduced

    # What a subclass says

    def bucket_key(self, entry: NamedParameter) -> BucketKey:
        """What the parameter shares with all others of its bucket."""
        return BucketKey(str(entry.parameter.dtype), self._device_name(entry.parameter.device))

    def buffer_dtype(self, bucket: Bucket) -> torch.dtype:
        """The dtype of the bucket's flat buffer; the gradients' unless overridden."""
        return self.first_parameter(bucket).dtype

    def write_to_bucket(self, entry: NamedParameter, bucket: Bucket, slot: TensorSlice, part: int) -> None:
        """Put the entry's gradient, or zeros, into its place in the flat buffer."""
        target, gradient = slot.slice_of(self.flat_buffer(bucket, part)), self.dense_gradient(entry)
        if gradient is None:
            target.zero_()
        else:
            target.view(gradient.shape).copy_(gradient)

    @abc.abstractmethod
    def start_exchange(self, bucket: Bucket, part: int, flat: torch.Tensor) -> Any:
        """Start the exchange of a bucket that is full; what it returns goes to ``complete``."""

    @abc.abstractmethod
    def finish_exchange(self, started: Started) -> tuple[list[torch.Tensor], bool]:
        """The reduced flat buckets, the same on every rank, and whether the step may be taken."""

    # Planning

    def register_parameters(self, entries: Sequence[NamedParameter]) -> None:
        known = set(self.entries)
        added = [entry for entry in entries if entry not in known]
        base = len(self.entries)
        specs = [TensorSpec(entry.name, tuple(entry.parameter.shape),
                            entry.parameter.element_size(), self.bucket_key(entry)) for entry in added]
        groups = split_groups(self.options.groups, [entry.parameter for entry in added])
        for bucket in plan_buckets(specs, bucket_bytes=self.bucket_bytes, groups=groups):
            slots = tuple(TensorSlice(s.index + base, s.offset, s.numel) for s in bucket.slots)
            placed = Bucket(len(self.buckets), slots, bucket.kind)
            self.buckets.append(placed)
            for slot in slots:
                self._place[added[slot.index - base]] = (placed, slot)
        self.entries = [*self.entries, *added]
        self.specs += specs

    def _device_name(self, device: torch.device) -> str:
        """The device as ranks can compare it: each may know its own by another number."""
        known = [one for one in self._devices if one.type == device.type]
        if device not in known:
            self._devices.append(device)
            known.append(device)
        number = known.index(device)
        return f"{device.type} {number}" if number else device.type

    def first_parameter(self, bucket: Bucket) -> torch.nn.Parameter:
        """A parameter of the bucket: all have its dtype and device."""
        return self.entries[bucket.slots[0].index].parameter

    def flat_buffer(self, bucket: Bucket, part: int = 0) -> torch.Tensor:
        """The flat memory that gradients are put into: (numel,)."""
        key = (bucket.index, part)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(bucket.numel, dtype=self.buffer_dtype(bucket),
                                             device=self.first_parameter(bucket).device)
        return self._buffers[key]

    # During the backward pass

    def gradient_ready(self, entry: NamedParameter, passes_done: int, pass_number: int) -> None:
        if self.parts > 1:
            part = pass_number - 1
        elif passes_done == self.passes:
            part = 0
        else:
            return
        if entry not in self._place:
            return
        bucket, slot = self._place[entry]
        self.write_to_bucket(entry, bucket, slot, part)
        filled = self._filled.setdefault((bucket.index, part), set())
        filled.add(entry)
        if len(filled) == len(bucket.slots):
            self._start_bucket(bucket, part)

    def _start_bucket(self, bucket: Bucket, part: int) -> None:
        self._started[bucket.index, part] = self.start_exchange(bucket, part, self.flat_buffer(bucket, part))

    def start_remaining(self) -> None:
        """Start what the hooks did not: buckets with gradients missing, which count as zeros."""
        for bucket in self.buckets:
            for part in range(self.parts):
                key = (bucket.index, part)
                if key in self._started:
                    continue
                for slot in bucket.slots:
                    entry = self.entries[slot.index]
                    if entry not in self._filled.get(key, ()):
                        self.write_to_bucket(entry, bucket, slot, part)
                self._start_bucket(bucket, part)

    def dense_gradient(self, entry: NamedParameter) -> torch.Tensor | None:
        """The entry's gradient as a dense tensor; None when there is none.

        Raises:
            ValueError: it is sparse and ``sparse_as_dense`` is not set.
        """
        gradient = entry.parameter.grad
        if gradient is None or not gradient.is_sparse:
            return gradient
        if not self.options.sparse_as_dense:
            raise ValueError(
                f"{entry.name} has a sparse gradient, which "
                f"{registry.public_name(self.settings)} cannot take; pass sparse_as_dense=True "
                "to DistributedOptimizer, or make the layer's gradient dense"
            )
        self._sparse.add(entry)
        return gradient.to_dense()

    # At the end of the step

    def after_agreement(self) -> None:
        if self.options.sparse_as_dense:
            self._layouts.restart(self)

    def finish(self) -> bool:
        self._sparse |= self._layouts.learn_sparse(self, f"{self.prefix}/layouts")
        self.start_remaining()
        reduced, good = self.finish_exchange(self._started)
        if good:
            hold_frozen(self)
            for bucket, flat in zip(self.buckets, reduced, strict=True):
                for slot in bucket.slots:
                    self._give_back(self.entries[slot.index], slot.slice_of(flat))
        else:
            for entry in self.entries:  # so that a GradScaler sees it and backs off
                if entry not in self.frozen:
                    entry.parameter.grad = torch.full_like(entry.parameter, math.nan)
        self._scale_reduced = self.loss_scale()
        self._started.clear()  # all of it has been waited for
        staged, self._staged = self._staged, {}
        self.abort_step()
        self._usable, self._staged = good, staged
        return good

    def _give_back(self, entry: NamedParameter, piece: torch.Tensor) -> None:
        """Copy a piece of a flat bucket into the entry's gradient."""
        parameter, reduced = entry.parameter, piece.view(entry.parameter.shape)
        if entry in self.frozen:
            parameter.grad = None
        elif entry in self._sparse or self.options.sparse_only:
            parameter.grad = reduced.to(parameter.dtype).to_sparse()
        elif parameter.grad is None:
            parameter.grad = torch.empty_like(parameter).copy_(reduced)
        else:
            parameter.grad.copy_(reduced)

    # State that changes with the update

    STATE: Sequence[Part] = (STEPS,)

    def keeps_part(self, part: Part, bucket: Bucket) -> bool:
        """Whether the bucket has a tensor of that part."""
        del part, bucket
        return True

    def state_numel(self, part: Part, bucket: Bucket) -> int:
        """Elements of a part's tensor of a bucket, over all ranks where they share it."""
        del part
        return bucket.numel

    def state_options(self, bucket: Bucket) -> dict[str, Any]:
        """The dtype and device of state: float64 for float64 gradients, else float32."""
        dtype = torch.promote_types(self.buffer_dtype(bucket), torch.float32)
        return {"dtype": dtype, "device": self.first_parameter(bucket).device}

    def stage(self, part: str, bucket: Bucket, tensor: torch.Tensor) -> torch.Tensor:
        """Have a part's tensor of the bucket become this one when the step is taken, and not before."""
        return self._staged.setdefault(part, {}).setdefault(bucket.index, tensor)

    def staged_tensors(self, part: str) -> dict[int, torch.Tensor]:
        """What :meth:`stage` was given of a part since the last update, by number of the bucket."""
        return self._staged.get(part, {})

    def spare_memory(self, part: str, bucket: Bucket) -> torch.Tensor | None:
        """Memory of a part's tensor that is no longer needed, of any content; None where there is none."""
        return self._free_state.get(part, {}).pop(bucket.index, None)

    def loss_scale(self) -> float:
        """The loss scale of this step's gradients."""
        if self._scale_now is None:
            self._scale_now = float(self.options.loss_scale())
        return self._scale_now

    def state_rescale(self) -> float:
        """The factor that brings state from the loss scale that it carries to this step's."""
        return self.loss_scale() / self.state_scale

    def commit(self) -> None:
        if self._usable:
            for name, tensors in self._staged.items():
                kept, spare = getattr(self, name), self._free_state.setdefault(name, {})
                for index, tensor in sorted(tensors.items()):
                    if index in kept:
                        spare[index] = kept[index]
                    kept[index] = tensor
            self.steps += 1
            self.state_scale = self._scale_reduced
        self._usable, self._staged = False, {}

    def abandon(self) -> None:
        for name, tensors in self._staged.items():
            self._free_state.setdefault(name, {}).update(tensors)
        self._usable, self._staged = False, {}

    # Agreement of the ranks

    def build_fingerprint(self) -> Fingerprint:
        """What must be the same on every rank."""
        key = (len(self.specs), self.passes, frozenset(self.frozen))
        if self._fingerprint is None or self._fingerprint[0] != key:
            lines = [*registry.describe_reduction(self.settings)]
            lines += [f"half precision: {self.options.half}",
                      f"{self.passes} backward passes per step", *map(str, self.specs), *self.frozen_lines()]
            self._fingerprint = key, Fingerprint(tuple(lines))
        return self._fingerprint[1]

    def start_agreement(self, values: Sequence[float]) -> None:
        """Start to exchange a few numbers per rank, once a step; ``answers`` waits for them."""
        self._asked = PendingAgreement(self.collectives, self.build_fingerprint().number, values,
                                       f"{self.prefix}/agree")

    def finish_agreement(self) -> list[list[float]]:
        """Every rank's numbers, by rank.

        Raises:
            ValueError: on every rank, when their parameters or settings differ.
        """
        assert self._asked is not None
        numbers, rows = self._asked.read()
        if any(number != numbers[0] for number in numbers):
            raise self.collective_error(mismatch_message(
                "the ranks do not train the same parameters in the same way",
                self.collectives.allgather_object(self.build_fingerprint().lines,
                                                  f"{self.settings.label}/disagreement"),
                "Build the same model and optimizer on every rank"))
        return rows

    def agree(self, values: Sequence[float]) -> list[list[float]]:
        """Exchange a few numbers per rank: ``ask``, and wait for the ``answers``."""
        self.start_agreement(values)
        return self.finish_agreement()

    def collective_error(self, message: str) -> ValueError:
        """The error for what ``agree`` has shown; every rank must raise it."""
        return self.collectives.errors.raise_together(message)

    def abort_step(self) -> None:
        self._filled.clear()
        if self._started:  # what is under way may still write into its memory: it is not used again
            keep_alive_until_done(self.pending_handles())
            self._buffers = {}
        self._started.clear()
        self._back.clear()
        self._asked = None
        self._scale_now = None
        self._usable, self._staged = False, {}

    def pending_handles(self) -> list[Handle]:
        found = []
        first = [one for (index, _), one in self._started.items() if index not in self._back]
        for one in (*first, *self._back.values()):
            found += [part for part in (one if isinstance(one, tuple) else (one,))
                      if isinstance(part, Handle)]
        return found + (self._asked.pending_handles() if self._asked else [])

    def held_tensors(self) -> list[torch.Tensor]:
        """Flat buffers, state between steps and memory for it."""
        spare = [tensor for tensors in (*self._staged.values(), *self._free_state.values())
                 for tensor in tensors.values()]
        return [*self._buffers.values(), *spare,
                *(tensor for part in self.state_parts for tensor in state_tensors(self, part))]

    def bytes_held(self) -> int:
        """Bytes of all that is held between steps; what is pending may be a flat buffer."""
        held = {id(tensor): tensor for tensor in self.held_tensors()}
        return sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    def report(self) -> dict[str, Any]:
        lost = {"dropped_residuals": self.lost_residuals} if LOST_RESIDUALS in self.state_parts else {}
        return {"steps": self.steps, "buckets": len(self.buckets), "bytes_held": self.bytes_held(), **lost}

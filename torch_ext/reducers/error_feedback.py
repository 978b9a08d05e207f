"""Reducers that send less than the gradient and keep the rest: error feedback, whatever the method.

compensate (g + e) -> compress and send -> the mean of what all ranks sent -> keep the rest as e
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import horovod.torch as horovod
import torch

from hvd_ext.reducers.buckets import DENSE, Bucket, BucketKey, TensorSlice
from hvd_ext.reducers.error_feedback import STATE
from hvd_ext.reducers.filters import check_names
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.reducers.skipped_step import SkippedStep
from hvd_ext.state import Part
from hvd_ext.torch import async_d2h
from hvd_ext.torch.async_d2h import AsyncHostCopy
from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.reducers.base import NamedParameter, norm_and_finite
from hvd_ext.torch.reducers.buckets import BucketReducer, Started


class FeedbackReducer(BucketReducer):
    """What is common to compressions with error feedback, such as TopK.

    A bucket keeps three flat buffers: the residual e, g + e of this step, and the mean. After the
    exchange the rest of g + e is the pending residual; when the step is taken it becomes e, and e's
    memory takes the next g + e. A step in which some rank's gradient is not finite is skipped by all
    ranks, and one whose gradients are thrown away is dropped; e is then what it was. Residuals are
    float32, float64 for float64 gradients, and follow the loss scale.

    The settings have ``should_compress(name, shape)``, ``exclude`` and ``error_feedback``.
    """

    def __init__(self, collectives: Collectives, settings: Any, options: ReductionOptions) -> None:
        super().__init__(collectives, settings, options)
        self.skipped_steps = 0
        self._skipped = SkippedStep()
        self.residual: dict[int, torch.Tensor] = {}
        self._means: dict[int, torch.Tensor] = {}  # memory for the mean
        self._finite = True
        self._square = 0.0
        self._norms: list[AsyncHostCopy] = []  # of gradients on a GPU: their norm and their largest magnitude
        self._flags: list[AsyncHostCopy] = []
        self._last: dict[str, Any] = {}

    # What a subclass says

    @abc.abstractmethod
    def compress(self, bucket: Bucket, total: torch.Tensor, finite: bool) -> Any:
        """Compress ``total`` = g + e (numel,) of a bucket and start its exchange.

        With ``finite`` False the step is going to be skipped: send anything of the usual size.
        Returns something with ``wait()``, or a tensor, which goes to ``means``.
        """

    @abc.abstractmethod
    def decompress(self, received: Sequence[tuple[Bucket, Any]]) -> list[torch.Tensor]:
        """The mean over the ranks of every compressed bucket, (numel,), the same on every rank.

        Afterwards ``buffer(bucket)`` must hold what this rank did not send. ``swap_buffers(bucket)``
        gives memory for the mean.
        """

    def is_compressed(self, entry: NamedParameter) -> bool:
        """Whether the entry's gradient is compressed; otherwise it is sent whole."""
        return bool(self.settings.should_compress(entry.name, tuple(entry.parameter.shape)))

    def agreement_values(self) -> list[float]:
        """Further numbers that must be the same on every rank at each step."""
        return []

    # Planning and filling

    def register_parameters(self, entries: Sequence[NamedParameter]) -> None:
        if not self.entries:
            check_names(self.settings.exclude, [entry.name for entry in entries])
        super().register_parameters(entries)

    def bucket_key(self, entry: NamedParameter) -> BucketKey:
        route = self.settings.label if self.is_compressed(entry) else DENSE
        return replace(super().bucket_key(entry), route=route)

    def buffer_dtype(self, bucket: Bucket) -> torch.dtype:
        dtype = super().buffer_dtype(bucket)
        if bucket.kind.route != DENSE or dtype == torch.bfloat16:  # Horovod cannot add up bfloat16
            dtype = torch.promote_types(dtype, torch.float32)
        return dtype

    def write_to_bucket(self, entry: NamedParameter, bucket: Bucket, slot: TensorSlice, part: int) -> None:
        residual = self.residual.get(bucket.index)
        if residual is None or entry in self.frozen:
            super().write_to_bucket(entry, bucket, slot, part)
            return
        target, kept = slot.slice_of(self.flat_buffer(bucket)), slot.slice_of(residual)
        gradient = self.dense_gradient(entry)
        if gradient is None:
            torch.mul(kept, self.state_rescale(), out=target)
        else:
            torch.add(gradient, kept.view(gradient.shape), alpha=self.state_rescale(),
                      out=target.view(gradient.shape))

    @property
    def step_index(self) -> int:
        """Steps before this one, taken or skipped."""
        return self.steps + self.skipped_steps

    # The exchange

    def start_exchange(self, bucket: Bucket, part: int, flat: torch.Tensor) -> Any:
        finite = self._measure_bucket(bucket)
        self._finite &= finite
        if not bucket.numel:
            return flat
        if bucket.kind.route != DENSE:
            return self.compress(bucket, flat, finite)
        if self.collectives.size == 1:
            return flat
        return self.collectives.allreduce_async_(flat, f"{self.prefix}/bucket{bucket.index}",
                                                 op=horovod.Average, kind="dense")

    def _measure_bucket(self, bucket: Bucket) -> bool:
        """Whether the bucket's gradients are finite; their norm goes into the report.

        What a GPU has to say of either is on its way to the host, and True is assumed until it is there.
        """
        gradients = [g for g in (self.dense_gradient(self.entries[slot.index]) for slot in bucket.slots)
                     if g is not None]
        if gradients and not async_d2h.is_host_readable(gradients[0]):
            norms = [torch.nn.utils.get_total_norm(gradients, power) for power in (2.0, math.inf)]
            self._norms.append(AsyncHostCopy(torch.stack(norms)))
            return True
        norm, finite = norm_and_finite(gradients)
        self._square += norm * norm
        return finite

    def all_finite(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's elements are finite, else all ranks skip the step; of a GPU's as above."""
        flag = tensor.isfinite().all()
        if not async_d2h.is_host_readable(tensor):
            self._flags.append(AsyncHostCopy(flag))
            return True
        finite = bool(flag)
        self._finite &= finite
        return finite

    def _sync_device_flags(self) -> None:
        for copy in self._norms:
            norm, largest = copy.read().tolist()  # the norm of huge but finite gradients overflows
            self._square += norm * norm
            self._finite &= math.isfinite(largest) and not math.isnan(norm)
        self._finite &= all(bool(flag.read()) for flag in self._flags)

    def finish_exchange(self, started: Started) -> tuple[list[torch.Tensor], bool]:
        good = self._agree_to_go_on()
        # Also in a step that is skipped: every message must have been received.
        received = {index: handle.wait() if isinstance(handle, Handle) else handle
                    for (index, _), handle in sorted(started.items())}
        if good:
            compressed = [bucket for bucket in self.buckets if bucket.kind.route != DENSE]
            means = self.decompress([(bucket, received[bucket.index]) for bucket in compressed])
            received.update({bucket.index: mean
                             for bucket, mean in zip(compressed, means, strict=True)})
        self._record_metrics(good)
        self._skipped.begin_step(good, self.loss_scale())
        return [received[bucket.index] for bucket in self.buckets], good

    def _agree_to_go_on(self) -> bool:
        """Whether all ranks have finite gradients.

        Raises:
            ValueError: on every rank, when they are not at the same step with the same settings.
        """
        self._sync_device_flags()
        rows = self.agree([float(self._finite), float(self.step_index), self.loss_scale(),
                           *self.agreement_values()])
        if any(row[1:] != rows[0][1:] for row in rows):
            raise self.collective_error(
                "the ranks are not at the same point of training; their (step, loss scale, ratio if "
                f"there is one), by rank: {[tuple(row[1:]) for row in rows]}. Load the same "
                "checkpoint on every rank, and make settings that are functions depend on the step "
                "alone"
            )
        return all(row[0] == 1.0 for row in rows)

    def swap_buffers(self, bucket: Bucket) -> tuple[torch.Tensor, torch.Tensor]:
        """What is left of g + e, the residual once the step is taken, and memory for the mean."""
        left = self.flat_buffer(bucket)
        if not self.settings.error_feedback:
            return left, left
        if bucket.index not in self._means:
            self._means[bucket.index] = torch.empty_like(left)
        return self.stage("residual", bucket, left), self._means[bucket.index]

    def commit(self) -> None:
        self.skipped_steps += self._skipped.count_committed()
        taken = list(self.staged_tensors("residual"))
        super().commit()
        for index in taken:  # the mean's memory is free: it has been copied into the gradients
            free = self.spare_memory("residual", self.buckets[index])
            self._buffers[index, 0] = self._means.pop(index) if free is None else free

    def abandon(self) -> None:
        self.skipped_steps += self._skipped.count_abandoned(float(self.options.loss_scale()))
        self._staged.pop("residual", None)  # it is the flat buffer
        super().abandon()

    def abort_step(self) -> None:
        super().abort_step()
        self._finite = True
        self._square = 0.0
        self._norms.clear()
        self._flags.clear()

    # State

    STATE = STATE

    def keeps_part(self, part: Part, bucket: Bucket) -> bool:
        return bucket.kind.route != DENSE and (part.name != "residual" or bool(self.settings.error_feedback))

    def check_state_dict(self, state: dict[str, Any], **place: int | None) -> None:
        if state.get("residual") and not self.settings.error_feedback:
            raise ValueError(
                "the checkpoint holds residuals, which error_feedback=False would drop; pass "
                "reset_per_rank_state=True to drop them, or leave error feedback on")
        super().check_state_dict(state, **place)

    def forget_step(self) -> None:
        super().forget_step()
        self._last = {}

    # Figures

    def _record_metrics(self, taken: bool) -> None:
        self._last = {"step_taken": taken, "gradient_norm": math.sqrt(self._square) / self.loss_scale(),
                      **self.step_metrics()}

    def step_metrics(self) -> dict[str, Any]:
        """Further figures of the step under way."""
        return {}

    def count_elements(self, *, compressed: bool) -> int:
        """Elements of the tensors that are compressed, or of those that are sent whole."""
        return sum(b.numel for b in self.buckets if (b.kind.route != DENSE) is compressed)

    def held_tensors(self) -> list[torch.Tensor]:
        return [*super().held_tensors(), *self._means.values()]

    def report(self) -> dict[str, Any]:
        """Figures of the last step; norms are of this rank's gradient and residual, unscaled."""
        norms = [float(torch.linalg.vector_norm(r, dtype=torch.float64))
                 for r in self.residual.values()]
        return {**super().report(), **self._last, "skipped_steps": self.skipped_steps,
                "residual_norm": math.hypot(*norms) / self.state_scale,
                "compressed_elements": self.count_elements(compressed=True),
                "dense_elements": self.count_elements(compressed=False)}

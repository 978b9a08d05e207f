"""TopK with error feedback: what each rank sends of its gradient, and the mean of what all sent.

compensate (g + e) -> select -> keep the rest -> pack -> allgather -> add up -> mean
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import horovod.torch as horovod
import torch

from hvd_ext.agreement import describe
from hvd_ext.buckets import Bucket, Kind, Slot, TensorSpec
from hvd_ext.exclude import check_names
from hvd_ext.topk import Layout, TopK
from hvd_ext.topk.plan import DENSE, TOPK, Segment, check_bucket, route, segments
from hvd_ext.topk.wire import check_messages
from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.reducers import topk_kernels as kernels
from hvd_ext.torch.reducers.base import Entry
from hvd_ext.torch.reducers.buckets import BucketReducer


class TopKReducer(BucketReducer):
    """The reducer of ``compression=hvd.Compression.topk(...)``: SPARS-AMS Algorithm 1, lines 7-12.

    A bucket keeps two flat buffers: the residual e, and g + e of this step. When the step is taken
    they change places: what is left of g + e is the next residual, and the old one's memory takes
    the mean. A step in which some rank's gradient is not finite is skipped by all; e is then what
    it was. Residuals are float32, float64 for float64 gradients.

    Args:
        collectives: the ranks to reduce over.
        passes: backward passes per step.
        config: the method's settings.
        scaler: a ``torch.amp.GradScaler`` whose scale the gradients carry, or None. Residuals
            follow when the scale changes.
    """

    def __init__(self, collectives: Collectives, passes: int, config: TopK, *, label: str = "topk",
                 scaler: Any = None, groups: Any = None, sparse_as_dense: bool = False) -> None:
        super().__init__(collectives, passes, label=label, settings=describe(config),
                         bucket_bytes=config.bucket_bytes, groups=groups,
                         sparse_as_dense=sparse_as_dense)
        self.config = config
        self.scaler = scaler
        self.residual: dict[int, torch.Tensor] = {}
        self.steps = 0
        self.skipped_steps = 0
        self._kept_scale = 1.0  # the loss scale that the residual carries
        self._sum: dict[int, torch.Tensor] = {}  # g + e; of buckets that go whole, g
        self._messages: dict[int, Handle | torch.Tensor] = {}
        self._received: dict[int, torch.Tensor] = {}
        self._scale_now: float | None = None
        self._finite = True
        self._sent = 0
        self._seconds = 0.0
        self._square = 0.0
        self._last: dict[str, Any] = {}

    # Planning

    def set_entries(self, entries: Sequence[Entry]) -> None:
        if not self.entries:
            check_names(self.config.exclude, [entry.name for entry in entries])
        super().set_entries(entries)

    def _spec(self, entry: Entry) -> TensorSpec:
        parameter = entry.parameter
        shape = tuple(parameter.shape)
        kind = Kind(str(parameter.dtype), parameter.device.type,
                    route=route(entry.name, shape, self.config))
        return TensorSpec(entry.name, shape, parameter.element_size(), kind)

    def _plan_changed(self) -> None:
        for bucket in self.buckets:
            check_bucket(bucket, self.entries[bucket.slots[0].index].name)

    def _segments(self, bucket: Bucket) -> list[Segment]:
        ratio = self.config.ratio_at(self.steps + self.skipped_steps)
        return segments(bucket, ratio, per_tensor=self.config.per_tensor)

    def _layout(self, bucket: Bucket) -> Layout:
        return Layout(sum(segment.k for segment in self._segments(bucket)), self.config.values)

    # During the backward pass

    def _take(self, entry: Entry, bucket: Bucket, slot: Slot, part: int, *,
              late: bool = False) -> None:
        total = self._buffer(bucket)
        target = total[slot.offset : slot.offset + slot.numel]
        residual = self.residual.get(bucket.index)
        kept = None if residual is None else residual[slot.offset : slot.offset + slot.numel]
        gradient = self.dense(entry)
        if gradient is not None:
            target = target.view(gradient.shape)
            if kept is None:
                target.copy_(gradient)
            else:
                torch.add(gradient, kept.view(gradient.shape), alpha=self._rescale(), out=target)
        elif kept is not None:
            torch.mul(kept, self._rescale(), out=target)
        else:
            target.zero_()

    def _buffer(self, bucket: Bucket) -> torch.Tensor:
        if bucket.index not in self._sum:
            parameter = self.entries[bucket.slots[0].index].parameter
            dtype = parameter.dtype
            if bucket.kind.route == TOPK or dtype == torch.bfloat16:  # Horovod cannot add up bfloat16
                dtype = torch.promote_types(dtype, torch.float32)
            self._sum[bucket.index] = torch.empty(bucket.numel, dtype=dtype,
                                                  device=parameter.device)
        return self._sum[bucket.index]

    def _scale(self) -> float:
        """The loss scale of this step's gradients."""
        if self._scale_now is None:
            enabled = self.scaler is not None and self.scaler.is_enabled()
            self._scale_now = float(self.scaler.get_scale()) if enabled else 1.0
        return self._scale_now

    def _rescale(self) -> float:
        """What brings the residual from the loss scale that it carries to this step's."""
        return self._scale() / self._kept_scale

    def _start(self, bucket: Bucket, part: int) -> None:
        if not bucket.numel:
            return
        finite = self._measure(bucket)
        self._finite &= finite
        total = self._buffer(bucket)
        name = f"{self.label}/bucket{bucket.index}"
        if bucket.kind.route == DENSE:
            message: Handle | torch.Tensor = total
            if self.collectives.size > 1:
                message = self.collectives.allreduce_async_(total, name, op=horovod.Average,
                                                            kind="dense")
        else:
            message = self._compress(bucket, total, finite)
            if self.collectives.size > 1:
                parts = self._layout(bucket).parts()
                memory = self._received.setdefault(bucket.index, message.new_empty(0))
                message = self.collectives.allgather_async(message, name, kind=parts, out=memory)
        self._messages[bucket.index] = message

    def _measure(self, bucket: Bucket) -> bool:
        """Whether the bucket's gradients are finite; their norm goes into the report."""
        gradients = [g for g in (self.dense(self.entries[slot.index]) for slot in bucket.slots)
                     if g is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        self._square += norm * norm
        # The norm of huge but finite gradients overflows: only then look at every element.
        return math.isfinite(norm) or all(bool(g.isfinite().all()) for g in gradients)

    def _compress(self, bucket: Bucket, total: torch.Tensor, finite: bool) -> torch.Tensor:
        """Choose from g + e, leave the new e in its place; the message."""
        began = time.perf_counter()
        layout = self._layout(bucket)
        dtype = kernels.wire_dtype(self.config)
        if finite:
            seed = (self.config.seed, self.steps + self.skipped_steps, bucket.index)
            positions = kernels.select(total, self._segments(bucket), self.config, seed)
            # g + e may overflow where neither does; the largest would be among the chosen.
            finite = bool(total[positions].isfinite().all())
            self._finite &= finite
        if finite:
            values = kernels.split(total, positions, dtype)
        else:
            positions = torch.empty(0, dtype=torch.int64, device=total.device)
            values = torch.empty(0, dtype=dtype, device=total.device)
        message = kernels.pack(positions, values, layout)
        self._sent += positions.numel()
        self._seconds += time.perf_counter() - began
        return message

    # At the end of the step

    def finish(self) -> bool:
        self.begin_rest()
        good = self._agree_to_go_on()
        gathered = {index: message.wait() if isinstance(message, Handle) else message
                    for index, message in sorted(self._messages.items())}
        if good:
            for index, messages in gathered.items():
                self._add_up(self.buckets[index], messages)
            self._kept_scale = self._scale()
        else:
            for entry in self.entries:  # so that a GradScaler sees it and backs off
                entry.parameter.grad = torch.full_like(entry.parameter, math.nan)
        self._note(good)
        self.steps += good
        self.skipped_steps += not good
        self.forget()
        return good

    def _agree_to_go_on(self) -> bool:
        """Whether all ranks have finite gradients.

        Raises:
            ValueError: on every rank, when they are not at the same step with the same settings.
        """
        step = self.steps + self.skipped_steps
        mine = [float(self._finite), float(step), self.config.ratio_at(step), self._scale()]
        rows = self.agree(mine) if self.collectives.size > 1 else [mine]
        if any(row[1:] != rows[0][1:] for row in rows):
            raise ValueError(
                "the ranks are not at the same point of training; their (step, ratio, loss scale), "
                f"by rank: {[tuple(row[1:]) for row in rows]}. Load the same checkpoint on every "
                "rank, and make a ratio that is a function depend on the step alone"
            )
        return all(row[0] == 1.0 for row in rows)

    def _add_up(self, bucket: Bucket, messages: torch.Tensor) -> None:
        """The mean of what all ranks sent becomes the gradient, what was left of g + e the residual."""
        if bucket.kind.route == DENSE:
            mean = messages
        else:
            ranks, layout = self.collectives.size, self._layout(bucket)
            counts = check_messages(messages.numel(), kernels.headers(messages, ranks), layout,
                                    f"{self.label}/bucket{bucket.index}")
            left = self._buffer(bucket)
            if self.config.error_feedback:
                mean = self.residual.get(bucket.index)
                mean = torch.zeros_like(left) if mean is None else mean.zero_()
                self.residual[bucket.index], self._sum[bucket.index] = left, mean
            else:
                mean = left.zero_()
            kernels.add_up(messages, counts, layout, kernels.wire_dtype(self.config), mean)
            if ranks > 1:
                mean.div_(ranks)
        for slot in bucket.slots:
            entry = self.entries[slot.index]
            piece = mean[slot.offset : slot.offset + slot.numel]
            self.give_back(entry, piece.view(entry.parameter.shape))

    def forget(self) -> None:
        super().forget()
        self._messages.clear()
        self._scale_now = None
        self._finite = True
        self._sent = 0
        self._seconds = 0.0
        self._square = 0.0

    # State

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "loss_scale": self._kept_scale,
            "residual": {entry.name: piece.clone() for entry, piece in self._residual_pieces()},
        }

    def _residual_pieces(self) -> list[tuple[Entry, torch.Tensor]]:
        return [(self.entries[slot.index],
                 self.residual[bucket.index][slot.offset : slot.offset + slot.numel])
                for bucket in self.buckets if bucket.index in self.residual
                for slot in bucket.slots]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = state["residual"]
        if saved:
            if not self.config.error_feedback:
                raise ValueError(
                    "the checkpoint holds residuals, which error_feedback=False would drop; pass "
                    "reset_per_rank_state=True to drop them, or leave error feedback on"
                )
            self._check_saved(saved)
        self.reset_state()
        self.steps = state["steps"]
        self.skipped_steps = state["skipped_steps"]
        self._kept_scale = state["loss_scale"]
        if saved:
            for bucket in self.buckets:
                if bucket.kind.route == TOPK:
                    self.residual[bucket.index] = torch.zeros_like(self._buffer(bucket))
            for entry, piece in self._residual_pieces():
                piece.copy_(saved[entry.name])

    def _check_saved(self, saved: dict[str, torch.Tensor]) -> None:
        expected = {self.entries[slot.index].name: slot.numel for bucket in self.buckets
                    if bucket.kind.route == TOPK for slot in bucket.slots}
        found = {name: piece.numel() for name, piece in saved.items()}
        if found != expected:
            names = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
            raise ValueError(
                f"the checkpoint's residuals do not fit this model: {', '.join(names[:4])} differ "
                f"({len(names)} in all). Use the model, exclude= and min_size= that it was saved "
                "with, or pass reset_per_rank_state=True to start without residuals"
            )

    def reset_state(self) -> None:
        self.forget()
        self.residual = {}
        self.steps = self.skipped_steps = 0
        self._kept_scale = 1.0
        self._last = {}

    def _note(self, taken: bool) -> None:
        compressed = sum(b.numel for b in self.buckets if b.kind.route == TOPK)
        self._last = {
            "step_taken": taken,
            "ratio": self.config.ratio_at(self.steps + self.skipped_steps),
            "kept_fraction": self._sent / compressed if compressed else 1.0,
            "gradient_norm": math.sqrt(self._square) / self._scale(),
            "selection_seconds": self._seconds,
        }

    def report(self) -> dict[str, Any]:
        """Figures of the last step; norms are of this rank's gradient and residual, unscaled."""
        norms = [float(torch.linalg.vector_norm(r, dtype=torch.float64))
                 for r in self.residual.values()]
        held = [*self._sum.values(), *self.residual.values(), *self._received.values()]
        return {
            **self._last,
            "residual_norm": math.hypot(*norms) / self._kept_scale,
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "buckets": len(self.buckets),
            "compressed_elements": sum(b.numel for b in self.buckets if b.kind.route == TOPK),
            "dense_elements": sum(b.numel for b in self.buckets if b.kind.route == DENSE),
            "bytes_held": sum(t.numel() * t.element_size() for t in held),
        }

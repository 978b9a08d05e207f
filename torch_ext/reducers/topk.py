"""TopK with error feedback: what each rank sends of its gradient, and the mean of what all sent.

compensate (g + e) -> select -> keep the rest -> pack -> allgather -> add up -> mean

or, with ``exchange="sparse_allreduce"``, what ``topk_sparse.py`` does with what was selected.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from hvd_ext.reducers.buckets import Bucket
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.reducers.topk import STATE, Layout, TopK
from hvd_ext.reducers.topk.exchange_choice import select_exchange
from hvd_ext.reducers.topk.plan import Segment, check_bucket, plan_segments
from hvd_ext.reducers.topk.wire import check_messages
from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.reducers.base import NamedParameter
from hvd_ext.torch.reducers.error_feedback import FeedbackReducer
from hvd_ext.torch.reducers.frozen import frozen_slots
from hvd_ext.torch.reducers.kernels import topk as kernels
from hvd_ext.torch.reducers.topk_allreduce import SparseAllreduce


class TopKReducer(FeedbackReducer):
    """The reducer of ``compression=hvd.Compression.topk(...)``: SPARS-AMS Algorithm 1, lines 7-12."""

    settings: TopK

    def __init__(self, collectives: Collectives, settings: TopK, options: ReductionOptions) -> None:
        super().__init__(collectives, settings, options)
        self.sparse = SparseAllreduce(collectives, settings, self.buckets, self.state_options)
        self._received: dict[int, torch.Tensor] = {}
        self._sent = 0
        self._seconds = 0.0

    def register_parameters(self, entries: Sequence[NamedParameter]) -> None:
        super().register_parameters(entries)
        for bucket in self.buckets:
            check_bucket(bucket, self.entries[bucket.slots[0].index].name)

    def agreement_values(self) -> list[float]:
        return [self.settings.ratio_at(self.step_index)]

    def _bucket_segments(self, bucket: Bucket) -> list[Segment]:
        return plan_segments(bucket, self.settings.ratio_at(self.step_index),
                             per_tensor=self.settings.per_tensor)

    def _message_layout(self, bucket: Bucket) -> Layout:
        return Layout(sum(segment.k for segment in self._bucket_segments(bucket)), self.settings.values)

    def _is_sparse(self, bucket: Bucket) -> bool:
        """Whether the bucket travels by sparse allreduce; the same on every rank, and at every step."""
        k = sum(one.k for one in plan_segments(bucket, self.settings.ratio_at(0),
                                               per_tensor=self.settings.per_tensor))
        return select_exchange(self.settings.exchange, self.collectives.size, k,
                               self.settings.values) != "allgather"

    def compress(self, bucket: Bucket, total: torch.Tensor, finite: bool) -> Handle | torch.Tensor:
        """Choose from g + e and leave the new e in its place (lines 7 and 8); send what was chosen."""
        began = time.perf_counter()
        layout, dtype = self._message_layout(bucket), kernels.wire_dtype(self.settings)
        if finite:
            self._fold_owner_residual(bucket, total)
            seed = (self.settings.seed, self.step_index, bucket.index)
            positions = kernels.select_entries(total, self._bucket_segments(bucket), self.settings, seed)
            # g + e may overflow where neither does; the largest would be among the chosen.
            finite = self.all_finite(total[positions])
        if finite:
            values = kernels.split_selected(total, positions, dtype)
        else:
            positions = torch.empty(0, dtype=torch.int64, device=total.device)
            values = torch.empty(0, dtype=dtype, device=total.device)
        self._sent += positions.numel()
        if self._is_sparse(bucket):
            self._seconds += time.perf_counter() - began
            return self.sparse.send_to_owners(bucket, positions, values, self.prefix)
        message = kernels.pack_message(positions, values, layout)
        self._seconds += time.perf_counter() - began
        if self.collectives.size == 1:
            return message
        memory = self._received.setdefault(bucket.index, message.new_empty(0))
        return self.collectives.allgather_async(
            message, f"{self.prefix}/bucket{bucket.index}", kind=layout.bytes_by_kind(), out=memory)

    def _fold_owner_residual(self, bucket: Bucket, total: torch.Tensor) -> None:
        """What this rank kept as the owner of a range, when it is no longer that, goes back into e."""
        if self._is_sparse(bucket) and not self.sparse.is_stale(bucket):
            return
        if self.sparse.has_residual(bucket):
            residual = self.residual.setdefault(bucket.index, torch.zeros_like(total))
            self.sparse.fold_residual(bucket.index, total, self.state_rescale(), keep=True)
            self.sparse.fold_residual(bucket.index, residual)
            for slot in frozen_slots(self, bucket):
                slot.slice_of(total).zero_()

    def decompress(self, received: Sequence[tuple[Bucket, torch.Tensor]]) -> list[torch.Tensor]:
        """The sum of what all ranks sent (line 12), divided by their number."""
        found = {}
        sparse = [(bucket, messages, self._message_layout(bucket).k) for bucket, messages in received
                  if self._is_sparse(bucket)]
        means = self.sparse.finish_exchange(sparse, self.prefix, self.swap_buffers, self.state_rescale(),
                                            partial(frozen_slots, self))
        for (bucket, _, _), mean in zip(sparse, means, strict=True):
            found[bucket.index] = mean
        ranks = self.collectives.size
        for bucket, messages in received:
            if bucket.index in found:
                continue
            layout = self._message_layout(bucket)
            counts = check_messages(messages.numel(), kernels.read_headers(messages, ranks), layout,
                                    f"{self.prefix}/bucket{bucket.index}")
            _, mean = self.swap_buffers(bucket)
            kernels.add_up(messages, counts, layout, kernels.wire_dtype(self.settings), mean.zero_())
            found[bucket.index] = mean.div_(ranks) if ranks > 1 else mean
        return [found[bucket.index] for bucket, _ in received]

    def commit(self) -> None:
        self.sparse.commit()
        super().commit()

    def abandon(self) -> None:
        super().abandon()
        self.sparse.abandon()

    def abort_step(self) -> None:
        if self._started:  # what is under way may still write into it
            self._received = {}
        super().abort_step()
        self._sent = 0
        self._seconds = 0.0

    # State and figures

    STATE = STATE

    def fold_local_state(self) -> None:
        for bucket in self.buckets:
            if self.sparse.has_residual(bucket):
                kept = self.residual.setdefault(bucket.index, torch.zeros_like(self.flat_buffer(bucket)))
                self.sparse.fold_residual(bucket.index, kept)
        self.sparse.owned = {}

    def step_metrics(self) -> dict[str, Any]:
        compressed = self.count_elements(compressed=True)
        return {"ratio": self.settings.ratio_at(self.step_index),
                "kept_fraction": self._sent / compressed if compressed else 1.0,
                "selection_seconds": self._seconds, **self._sparse_figures()}

    def _sparse_figures(self) -> dict[str, Any]:
        """Of buckets that travel by sparse allreduce, when there are any."""
        if not self.sparse.is_used:
            return {}
        norms = [float(torch.linalg.vector_norm(one, dtype=torch.float64))
                 for one in self.sparse.state_tensors()]
        return {"owner_residual_norm": math.hypot(*norms) / self.loss_scale(),
                "owner_imbalance": self.sparse.imbalance, "applied_entries": self.sparse.applied}

    def held_tensors(self) -> list[torch.Tensor]:
        return [*super().held_tensors(), *self._received.values()]

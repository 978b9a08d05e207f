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
from hvd_ext.reducers.topk import Layout, TopK
from hvd_ext.reducers.topk.exchange_choice import select_exchange
from hvd_ext.reducers.topk.plan import Segment, check_bucket, plan_segments
from hvd_ext.reducers.topk.wire import check_messages
from hvd_ext.state import RANK, Part
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
        self.sparse = SparseAllreduce(collectives, settings)
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
            self.sparse.fold_residual(bucket.index, total, self._residual_scale(), keep=True)
            self.sparse.fold_residual(bucket.index, residual)
            for slot in frozen_slots(self, bucket):
                slot.slice_of(total).zero_()

    def decompress(self, received: Sequence[tuple[Bucket, torch.Tensor]]) -> list[torch.Tensor]:
        """The sum of what all ranks sent (line 12), divided by their number."""
        found = {}
        sparse = [(bucket, messages, self._message_layout(bucket).k) for bucket, messages in received
                  if self._is_sparse(bucket)]
        means = self.sparse.finish_exchange(sparse, self.prefix, self.swap_buffers, self._residual_scale(),
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

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "owned": self.sparse.state_dict()}

    STATE = (*FeedbackReducer.STATE, Part("owned", RANK, "owners' residuals"))

    def of_other_rank(self, state: dict[str, Any], *, same_ranks: bool) -> dict[str, Any]:
        """Also who owns which range, on which the ranks must agree."""
        ranges = {number: {**one, "rank": self.collectives.rank, "residual": None}
                  for number, one in state.get("owned", {}).items()}
        return {**super().of_other_rank(state, same_ranks=same_ranks), **(
            {"owned": ranges} if same_ranks else {})}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        super().check_state_dict(state)
        owned = state.get("owned", {})
        for number, one in owned.items():
            bucket = self.buckets[number] if number < len(self.buckets) else None
            if bucket is None or one["bounds"][-1] != bucket.numel:
                raise ValueError(
                    f"the checkpoint's residual of bucket {number} does not fit this model; use the "
                    "model, bucket_bytes= and groups= that it was saved with, or pass "
                    "reset_per_rank_state=True to start without residuals")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        owned = state.get("owned", {})
        self.sparse.load_state_dict(owned, {number: self.flat_buffer(self.buckets[number]).device
                                            for number in owned})

    def reset_per_rank_state(self) -> None:
        super().reset_per_rank_state()
        self.sparse.owned = {}

    def average_local_state(self) -> None:
        for bucket in self.buckets:
            if self.sparse.has_residual(bucket):
                kept = self.residual.setdefault(bucket.index, torch.zeros_like(self.flat_buffer(bucket)))
                self.sparse.fold_residual(bucket.index, kept)
        self.sparse.owned = {}
        super().average_local_state()

    def restore(self, committed: dict[str, Any], own: dict[str, Any] | None) -> None:
        super().restore({**committed, "owned": {} if own is None else own["owned"]}, own)

    def step_metrics(self) -> dict[str, Any]:
        compressed = self.count_elements(compressed=True)
        return {"ratio": self.settings.ratio_at(self.step_index),
                "kept_fraction": self._sent / compressed if compressed else 1.0,
                "selection_seconds": self._seconds, **self._sparse_figures()}

    def _sparse_figures(self) -> dict[str, Any]:
        """Of buckets that travel by sparse allreduce, when there are any."""
        if not self.sparse.owned:
            return {}
        norms = [float(torch.linalg.vector_norm(one, dtype=torch.float64))
                 for one in self.sparse.owner_residuals()]
        return {"owner_residual_norm": math.hypot(*norms) / self._loss_scale(),
                "owner_imbalance": self.sparse.imbalance, "applied_entries": self.sparse.applied}

    def bytes_held(self) -> int:
        received = sum(t.numel() * t.element_size() for t in self._received.values())
        return super().bytes_held() + received + self.sparse.bytes_held()

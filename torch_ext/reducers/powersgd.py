"""PowerSGD: a rank-r approximation of every gradient matrix, by two allreduces, with error feedback.

compensate (D = g + e) -> P = D Q -> allreduce -> orthogonalize -> Q = D^T P -> allreduce -> P Q^T
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hvd_ext.reducers.buckets import Bucket
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.reducers.powersgd import STATE, Matrix, PowerSGD, factor_sizes, first_q, plan_matrices
from hvd_ext.state import Part
from hvd_ext.torch.async_d2h import AsyncHostCopy
from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.reducers.error_feedback import FeedbackReducer
from hvd_ext.torch.reducers.kernels import powersgd as kernels


class PowerSGDReducer(FeedbackReducer):
    """The reducer of ``compression=hvd.Compression.powersgd(...)``: arXiv 1905.13727, Algorithms 1, 2.

    Q, the same on every rank, is kept from step to step (warm start).
    """

    settings: PowerSGD

    def __init__(self, collectives: Collectives, settings: PowerSGD, options: ReductionOptions) -> None:
        super().__init__(collectives, settings, options)
        self.q: dict[int, torch.Tensor] = {}
        self._began: dict[int, torch.Tensor] = {}  # Q that the step under way begins with
        self._any: dict[int, AsyncHostCopy] = {}  # whether Q has anything but zeros, asked after a step

    def _bucket_matrices(self, bucket: Bucket) -> list[Matrix]:
        return plan_matrices(bucket, self.specs, self.settings.rank)

    def _previous_q(self, bucket: Bucket, like: torch.Tensor) -> torch.Tensor:
        """All Q of the bucket that this step begins with, flat."""
        step = 0 if self.settings.warm_start else self.step_index
        kept, asked = self.q.get(bucket.index), self._any.get(bucket.index)
        if kept is None or not self.settings.warm_start or not bool(asked.read() if asked else kept.any()):
            self._any.pop(bucket.index, None)
            drawn = first_q(self._bucket_matrices(bucket), (self.settings.seed, bucket.index, step))
            kept = torch.from_numpy(drawn).to(like)
        self._began[bucket.index] = kept
        return kept

    def compress(self, bucket: Bucket, total: torch.Tensor, finite: bool) -> Handle | torch.Tensor:
        """``P = D Q``, and its mean over the ranks."""
        p = kernels.left_factors(total, self._previous_q(bucket, total), self._bucket_matrices(bucket))
        # g + e may overflow where neither does.
        if not (self.all_finite(p) and finite):
            p.zero_()
        return self._start_mean(p, bucket, "p")

    def decompress(self, received: Sequence[tuple[Bucket, torch.Tensor]]) -> list[torch.Tensor]:
        """``Q = D^T P`` and its mean over the ranks; then ``P Q^T``, the same on every rank."""
        sent = []
        for bucket, p in received:
            found = self._bucket_matrices(bucket)
            kernels.orthogonalize_columns(p, found)
            memory = self.spare_memory("q", bucket)
            q = kernels.right_factors(self.flat_buffer(bucket), p, found,
                                      torch.empty_like(self._began[bucket.index])
                                      if memory is None else memory)
            sent.append(self._start_mean(q, bucket, "q"))
        result = []
        for (bucket, p), handle in zip(received, sent, strict=True):
            q = handle.wait() if isinstance(handle, Handle) else handle
            self.stage("q", bucket, q)
            left, mean = self.swap_buffers(bucket)
            kernels.expand_factors(p, q, self._bucket_matrices(bucket), left, mean)
            for one in self._bucket_matrices(bucket):  # D = 0 has left Q = 0
                if self.entries[one.slot.index] in self.frozen:
                    one.q.slice_of(q).copy_(one.q.slice_of(self._began[bucket.index]))
            result.append(mean)
        return result

    def _start_mean(self, factors: torch.Tensor, bucket: Bucket, which: str) -> Handle | torch.Tensor:
        if self.collectives.size == 1:
            return factors
        return self.collectives.allreduce_async_(
            factors, f"{self.prefix}/bucket{bucket.index}/{which}", kind="factors")

    def commit(self) -> None:
        if self._usable:
            for index, q in self.staged_tensors("q").items():
                self._any[index] = AsyncHostCopy(q.any())
        super().commit()

    def abort_step(self) -> None:
        super().abort_step()
        self._began.clear()

    # State

    STATE = STATE

    def state_numel(self, part: Part, bucket: Bucket) -> int:
        return factor_sizes(self._bucket_matrices(bucket))[1] if part.name == "q" else bucket.numel

    def forget_step(self) -> None:
        super().forget_step()
        self._any.clear()

    def step_metrics(self) -> dict[str, Any]:
        numbers = sum(one.p.numel + one.q.numel for bucket in self.buckets
                      if bucket.kind.route == self.settings.label for one in self._bucket_matrices(bucket))
        compressed = self.count_elements(compressed=True)
        return {"sent_fraction": numbers / compressed if compressed else 1.0}

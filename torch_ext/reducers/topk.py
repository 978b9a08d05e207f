"""TopK with error feedback: what each rank sends of its gradient, and the mean of what all sent.

compensate (g + e) -> select -> keep the rest -> pack -> allgather -> add up -> mean
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from hvd_ext.buckets import Bucket
from hvd_ext.options import Options
from hvd_ext.topk import Layout, TopK
from hvd_ext.topk.plan import Segment, check_bucket, segments
from hvd_ext.topk.wire import check_messages
from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.reducers import topk_kernels as kernels
from hvd_ext.torch.reducers.base import Entry
from hvd_ext.torch.reducers.feedback import FeedbackReducer


class TopKReducer(FeedbackReducer):
    """The reducer of ``compression=hvd.Compression.topk(...)``: SPARS-AMS Algorithm 1, lines 7-12."""

    settings: TopK

    def __init__(self, collectives: Collectives, settings: TopK, options: Options) -> None:
        super().__init__(collectives, settings, options)
        self._received: dict[int, torch.Tensor] = {}
        self._sent = 0
        self._seconds = 0.0

    def build(self, entries: Sequence[Entry]) -> None:
        super().build(entries)
        for bucket in self.buckets:
            check_bucket(bucket, self.entries[bucket.slots[0].index].name)

    def agreed(self) -> list[float]:
        return [self.settings.ratio_at(self.attempts)]

    def _segments(self, bucket: Bucket) -> list[Segment]:
        return segments(bucket, self.settings.ratio_at(self.attempts),
                        per_tensor=self.settings.per_tensor)

    def _layout(self, bucket: Bucket) -> Layout:
        return Layout(sum(segment.k for segment in self._segments(bucket)), self.settings.values)

    def send(self, bucket: Bucket, total: torch.Tensor, finite: bool) -> Handle | torch.Tensor:
        """Choose from g + e and leave the new e in its place (lines 7 and 8); send what was chosen."""
        began = time.perf_counter()
        layout, dtype = self._layout(bucket), kernels.wire_dtype(self.settings)
        if finite:
            seed = (self.settings.seed, self.attempts, bucket.index)
            positions = kernels.select(total, self._segments(bucket), self.settings, seed)
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
        if self.collectives.size == 1:
            return message
        memory = self._received.setdefault(bucket.index, message.new_empty(0))
        return self.collectives.allgather_async(
            message, f"{self.prefix}/bucket{bucket.index}", kind=layout.parts(), out=memory)

    def means(self, received: Sequence[tuple[Bucket, torch.Tensor]]) -> list[torch.Tensor]:
        """The sum of what all ranks sent (line 12), divided by their number."""
        ranks, found = self.collectives.size, []
        for bucket, messages in received:
            layout = self._layout(bucket)
            counts = check_messages(messages.numel(), kernels.headers(messages, ranks), layout,
                                    f"{self.prefix}/bucket{bucket.index}")
            _, mean = self.swap(bucket)
            kernels.add_up(messages, counts, layout, kernels.wire_dtype(self.settings), mean.zero_())
            found.append(mean.div_(ranks) if ranks > 1 else mean)
        return found

    def forget(self) -> None:
        super().forget()
        self._sent = 0
        self._seconds = 0.0

    def figures(self) -> dict[str, Any]:
        compressed = self.elements(compressed=True)
        return {"ratio": self.settings.ratio_at(self.attempts),
                "kept_fraction": self._sent / compressed if compressed else 1.0,
                "selection_seconds": self._seconds}

    def bytes_held(self) -> int:
        return super().bytes_held() + sum(t.numel() * t.element_size()
                                          for t in self._received.values())

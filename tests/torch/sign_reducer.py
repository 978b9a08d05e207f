"""A way to reduce gradients as a user of the package would write it: signSGD with majority vote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import hvd_ext.torch as hvd
from hvd_ext.torch.reducers.buckets import BucketReducer


@dataclass(frozen=True)
class Sign:
    """Every entry becomes ``scale`` times the sign that most ranks have (arXiv 1810.05291)."""

    slot: ClassVar[str] = "compression"
    label: ClassVar[str] = "sign"

    scale: float = 1.0


class SignReducer(BucketReducer):
    """Sums the ranks' signs, one allreduce per bucket, started while backward still runs."""

    def start_exchange(self, bucket: Any, part: int, flat: torch.Tensor) -> Any:
        return self.collectives.allreduce_async_(flat.sign_(), f"{self.prefix}/bucket{bucket.index}",
                                                 op=hvd.Sum)

    def finish_exchange(self, started: Mapping[tuple[int, int], Any]) -> tuple[list[torch.Tensor], bool]:
        self.agree([])  # an error on every rank where models or settings differ
        votes = [started[bucket.index, 0].wait() for bucket in self.buckets]
        return [vote.sign_().mul_(self.settings.scale) for vote in votes], True

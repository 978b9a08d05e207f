"""A way to reduce gradients as a user of the package would write it: signSGD with error feedback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hvd_ext.state import MEAN, PARAMETERS, RANK, Part
from hvd_ext.torch.reducers.buckets import BucketReducer


@dataclass(frozen=True)
class Sign:
    """``scale`` times the sign of every entry, with error feedback (after arXiv 1901.09847)."""

    slot: ClassVar[str] = "compression"
    label: ClassVar[str] = "sign"

    scale: float = 1.0


class SignReducer(BucketReducer):
    """The mean of the ranks' signs, one allreduce per bucket, started while backward still runs."""

    STATE = (*BucketReducer.STATE, Part("residual", RANK, "residuals", PARAMETERS, MEAN, scaled=True))

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.residual: dict[int, torch.Tensor] = {}  # by number of the bucket

    def start_exchange(self, bucket: Any, part: int, flat: torch.Tensor) -> Any:
        if bucket.index in self.residual:
            flat.add_(self.residual[bucket.index], alpha=self.state_rescale())
        sent = flat.sign() * (self.settings.scale * self.loss_scale())
        self.stage("residual", bucket, flat - sent)  # the residual, once this step is taken
        return self.collectives.allreduce_async_(sent, f"{self.prefix}/bucket{bucket.index}")

    def finish_exchange(self, started: Mapping[tuple[int, int], Any]) -> tuple[list[torch.Tensor], bool]:
        finite = all(bool(one.isfinite().all()) for one in self.staged_tensors("residual").values())
        good = all(one == [1.0] for one in self.agree([finite]))  # an error where models or settings differ
        return [started[bucket.index, 0].wait() for bucket in self.buckets], good

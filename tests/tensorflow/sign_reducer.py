"""A way to reduce gradients as a user of the package would write it: signSGD with majority vote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import tensorflow as tf

import hvd_ext.tensorflow as hvd
from hvd_ext.tensorflow.reducers.buckets import BucketReducer


@dataclass(frozen=True)
class Sign:
    """Every entry becomes ``scale`` times the sign that most ranks have (arXiv 1810.05291)."""

    slot: ClassVar[str] = "compression"
    label: ClassVar[str] = "sign"

    scale: float = 1.0


class SignReducer(BucketReducer):
    """Sums the ranks' signs, one allreduce per bucket, started while backward still runs."""

    def start_exchange(self, bucket: Any, part: int, flat: tf.Tensor) -> tf.Tensor:
        return self.collectives.allreduce(tf.sign(flat), f"{self.prefix}/sign/bucket{bucket.index}",
                                          op=hvd.Sum)

    def finish_exchange(self, started: Mapping[tuple[int, int], tf.Tensor],
                        **inputs: Any) -> tuple[list[tf.Tensor], Any]:
        votes = [started[bucket.index, 0] for bucket in self.buckets]
        return [tf.sign(vote) * self.settings.scale for vote in votes], None

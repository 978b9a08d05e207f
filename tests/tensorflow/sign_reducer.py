"""A way to reduce gradients as a user of the package would write it: signSGD with error feedback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import tensorflow as tf

from hvd_ext.state import MEAN, RANK, Part
from hvd_ext.tensorflow.reducers.buckets import BucketReducer

RESIDUAL = Part("residual", RANK, "residuals", resize=MEAN)


@dataclass(frozen=True)
class Sign:
    """``scale`` times the sign of every entry, with error feedback (after arXiv 1901.09847)."""

    slot: ClassVar[str] = "compression"
    label: ClassVar[str] = "sign"

    scale: float = 1.0


class SignReducer(BucketReducer):
    """The mean of the ranks' signs, one allreduce per bucket, started while backward still runs."""

    def make_state(self, make_variable: Any) -> None:
        self.left: dict[int, tf.Tensor] = {}
        self.residual = {bucket.index: self.make_part(make_variable, RESIDUAL, (bucket.numel,),
                                                      bucket.kind.dtype, bucket.index)
                         for bucket in self.buckets}

    def start_exchange(self, bucket: Any, part: int, flat: tf.Tensor) -> tf.Tensor:
        total = flat + self.without_left_out(bucket, self.residual[bucket.index].read_value())
        sent = tf.sign(total) * self.settings.scale
        self.left[bucket.index] = total - sent
        return self.collectives.allreduce(sent, f"{self.prefix}/sign/bucket{bucket.index}")

    def finish_exchange(self, started: Mapping[tuple[int, int], tf.Tensor],
                        **inputs: Any) -> tuple[list[tf.Tensor], Any]:
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(one)) for one in self.left.values()])
        good = tf.reduce_all(self.agree([finite]) == 1.0)
        for bucket in self.buckets:
            kept = self.residual[bucket.index]
            before = kept.read_value()
            after = self.keep_left_out(bucket, self.left[bucket.index], before)
            kept.assign(tf.where(good, after, before))
        return [started[bucket.index, 0] for bucket in self.buckets], good

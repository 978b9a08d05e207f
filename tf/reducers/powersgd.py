"""PowerSGD: a rank-r approximation of every gradient matrix, by two allreduces, with error feedback.

compensate (D = g + e) -> P = D Q -> allreduce -> orthogonalize -> Q = D^T P -> allreduce -> P Q^T
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hvd_ext.reducers.buckets import Bucket
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.reducers.powersgd import FACTORS, Matrix, PowerSGD, factor_sizes, first_q, plan_matrices
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reducers.base import MakeVariable
from hvd_ext.tensorflow.reducers.error_feedback import FeedbackReducer
from hvd_ext.tensorflow.reducers.kernels import powersgd as kernels
from hvd_ext.tensorflow.variables import name_of

OUTPUT_AXIS = -1  # of Keras' kernels


class InFlightFactors(NamedTuple):
    """A bucket on its way: D of its matrices and the mean P, both flat; whether this rank's D is finite."""

    total: tf.Tensor
    p: tf.Tensor
    finite: tf.Tensor


class PowerSGDReducer(FeedbackReducer):
    """The reducer of ``compression=hvd.Compression.powersgd(...)``: arXiv 1905.13727, Algorithms 1, 2.

    Q, the same on every rank, is kept from step to step (warm start); zeros stand for the first.
    """

    settings: PowerSGD

    def __init__(self, collectives: Collectives, settings: PowerSGD, options: ReductionOptions) -> None:
        super().__init__(collectives, settings, options)
        self.q: dict[int, tf.Variable] = {}
        self._q_before: dict[int, tf.Tensor] = {}  # of the step that is being traced

    def is_compressed(self, variable: Any) -> bool:
        return self.settings.should_compress(name_of(variable), tuple(variable.shape), OUTPUT_AXIS)

    def make_state(self, make_variable: MakeVariable) -> None:
        super().make_state(make_variable)
        if self.settings.warm_start:
            for bucket in self.compressed_buckets():
                self.q[bucket.index] = self.make_part(
                    make_variable, FACTORS, (factor_sizes(self._bucket_matrices(bucket))[1],),
                    self.residual_dtype(bucket), bucket.index)

    def _bucket_matrices(self, bucket: Bucket) -> list[Matrix]:
        return plan_matrices(bucket, self.specs, self.settings.rank, output_axis=OUTPUT_AXIS)

    def _first_q(self, bucket: Bucket) -> tf.Tensor:
        """All Q of the bucket that this step begins with, flat."""
        dtype, found = self.residual_dtype(bucket), self._bucket_matrices(bucket)

        def draw(step: int) -> np.ndarray:
            drawn = first_q(found, (self.settings.seed, bucket.index, step))
            return drawn.astype(dtype.as_numpy_dtype)

        if not self.settings.warm_start:
            q = tf.numpy_function(lambda step: draw(int(step)), [self.step_index()], dtype)
            return tf.ensure_shape(q, (factor_sizes(found)[1],))
        kept = self.q[bucket.index].read_value()
        return tf.cond(tf.reduce_all(tf.equal(kept, 0)), lambda: tf.constant(draw(0)), lambda: kept)

    # The exchange

    def compress(self, bucket: Bucket, gradient: tf.Tensor, residual: tf.Tensor | None) -> InFlightFactors:
        """``P = D Q``, and its mean over the ranks."""
        total = tf.cast(gradient, self.residual_dtype(bucket))
        total = total if residual is None else total + residual
        q = self._q_before[bucket.index] = self._first_q(bucket)
        p = kernels.left_factors(total, q, self._bucket_matrices(bucket))
        finite = tf.reduce_all(tf.math.is_finite(p))
        # A step with anything else is skipped; QR must not meet it.
        return InFlightFactors(total, self._mean_over_ranks(tf.where(finite, p, tf.zeros_like(p)), bucket,
                                                            "p"), finite)

    def decompress(self, sent: Sequence[tuple[Bucket, InFlightFactors]], good: tf.Tensor) -> list[tf.Tensor]:
        """``Q = D^T P`` and its mean over the ranks; then ``P Q^T``, the same on every rank."""
        result = []
        for bucket, one in sent:
            found = self._bucket_matrices(bucket)
            p = kernels.orthogonalize_columns(one.p, found)
            q = self._mean_over_ranks(kernels.right_factors(one.total, p, found), bucket, "q")
            if self.settings.warm_start:
                kept = self.q[bucket.index]
                before = self._q_before[bucket.index]
                after = [one.q.slice_of(before if one.slot.index in self.left_out else q) for one in found]
                kept.assign(tf.where(good, tf.concat(after, axis=0) if self.left_out else q,
                                     kept.read_value()))
            result.append(kernels.expand_factors(p, q, found))
        return result

    def new_residual(self, bucket: Bucket, sent: InFlightFactors, residual: tf.Tensor,
                     mean: tf.Tensor) -> tf.Tensor:
        return sent.total - mean

    def _mean_over_ranks(self, factors: tf.Tensor, bucket: Bucket, which: str) -> tf.Tensor:
        if self.collectives.size == 1:
            return factors
        return self.collectives.allreduce(factors, f"{self.bucket_name(bucket)}/{which}", kind="factors")

    def step_metrics(self) -> dict[str, Any]:
        numbers = sum(sum(factor_sizes(self._bucket_matrices(bucket)))
                      for bucket in self.compressed_buckets())
        compressed = self.count_elements(compressed=True)
        return {"sent_fraction": numbers / compressed if compressed else 1.0}

"""TopK with error feedback: what each rank sends of its gradient, and the mean of what all sent.

compensate (g + e) -> select -> keep the rest -> pack -> allgather -> add up -> mean
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from hvd_ext.buckets import Bucket, TensorSpec
from hvd_ext.sparse import Layout, TopK
from hvd_ext.sparse.plan import DENSE, TOPK, check_bucket, route, segments
from hvd_ext.tensorflow import sparse_kernels as kernels
from hvd_ext.tensorflow.buckets import BucketReducer
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reduce import MakeVariable
from hvd_ext.tensorflow.variables import name_of


class TopKReducer(BucketReducer):
    """The reducer of ``compression=hvd.Compression.topk(...)``: SPARS-AMS Algorithm 1, lines 7-12.

    A step in which some rank's gradient is not finite is skipped by all; e stays what it was.
    Residuals are float32, float64 for float64 gradients.

    Raises:
        NotImplementedError: a ratio that is a function of the step.
    """

    takes_accumulated = False  # a step that is skipped must not clear Keras' accumulators

    def __init__(self, collectives: Collectives, prefix: str, config: TopK, **options: Any) -> None:
        if callable(config.ratio):
            raise NotImplementedError(
                "a ratio that is a function of the step is not available in the TensorFlow front "
                "end, where messages have one length in a traced step; pass a number such as 0.01")
        super().__init__(collectives, prefix, settings=config.describe(),
                         bucket_bytes=config.bucket_bytes, **options)
        self.config = config
        self.residual: dict[int, tf.Variable] = {}
        self.skipped_steps: Any = None

    def build(self, variables: Sequence[Any], make_variable: MakeVariable) -> None:
        self.config.check_names(name_of(variable) for variable in variables)
        super().build(variables, make_variable)

    def spec(self, variable: Any) -> TensorSpec:
        plain = super().spec(variable)
        return TensorSpec(plain.name, plain.shape, plain.itemsize,
                          (*plain.kind, route(plain.name, plain.shape, self.config)))

    def make_state(self, make_variable: MakeVariable) -> None:
        self.skipped_steps = make_variable((), tf.int64, "skipped_steps", False)
        for bucket in self.buckets:
            check_bucket(bucket, self.specs[bucket.slots[0].index].name)
            if bucket.kind[-1] == TOPK and self.config.error_feedback:
                self.residual[bucket.index] = make_variable(
                    (bucket.numel,), self._dtype(bucket), f"residual_{bucket.index}", True)

    def per_rank_state(self) -> list[tf.Variable]:
        return list(self.residual.values())

    def _dtype(self, bucket: Bucket) -> tf.DType:
        return tf.float64 if bucket.kind[0] == "float64" else tf.float32

    def _layout(self, bucket: Bucket) -> Layout:
        parts = segments(bucket, self.config.ratio_at(0), per_tensor=self.config.per_tensor)
        return Layout(sum(part.k for part in parts), self.config.values)

    def exchange(self, flats: list[tf.Tensor], **inputs: Any) -> tuple[list[tf.Tensor], Any]:
        step = self.steps.read_value() + self.skipped_steps.read_value()
        finite = tf.constant(True)
        sent, kept = [], {}
        for bucket, gradient in zip(self.buckets, flats, strict=True):
            fine = tf.reduce_all(tf.math.is_finite(gradient))
            if bucket.kind[-1] == DENSE:
                sent.append(gradient)
            else:
                message, left, fine = self._compress(bucket, gradient, fine, step)
                sent.append(message)
                kept[bucket.index] = left
            finite = tf.logical_and(finite, fine)
        received = [self._send(bucket, message)
                    for bucket, message in zip(self.buckets, sent, strict=True)]
        good = tf.reduce_all(self.agree([finite])[:, 0] == 1.0)
        for index, residual in self.residual.items():
            residual.assign(tf.where(good, kept[index], residual.read_value()))
        self.steps.assign_add(tf.cast(good, tf.int64))
        self.skipped_steps.assign_add(1 - tf.cast(good, tf.int64))
        return [self._mean(bucket, message)
                for bucket, message in zip(self.buckets, received, strict=True)], good

    def _compress(self, bucket: Bucket, gradient: tf.Tensor, fine: tf.Tensor,
                  step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Choose from g + e; the message, the new e, and whether all of it is finite."""
        total = tf.cast(gradient, self._dtype(bucket))
        if bucket.index in self.residual:
            total = total + self.residual[bucket.index].read_value()
        # g + e may overflow where neither does.
        fine = tf.logical_and(fine, tf.reduce_all(tf.math.is_finite(total)))
        layout = self._layout(bucket)
        parts = segments(bucket, self.config.ratio_at(0), per_tensor=self.config.per_tensor)
        seed = (self.config.seed, bucket.index)
        positions = tf.cond(
            fine, lambda: kernels.select(total, parts, self.config, seed, step),
            lambda: tf.zeros((0,), tf.int32))
        values, left = kernels.split(total, positions, kernels.wire_dtype(self.config))
        return kernels.pack(positions, values, layout), left, fine

    def _send(self, bucket: Bucket, message: tf.Tensor) -> tf.Tensor:
        name = f"{self.prefix}/topk/bucket{bucket.index}"
        if self.collectives.size == 1:
            return message if bucket.kind[-1] == DENSE else message[None]
        if bucket.kind[-1] == DENSE:
            return self.collectives.allreduce(message, name, op=horovod.Average)
        words = self._layout(bucket).words
        gathered = self.collectives.allgather(tf.ensure_shape(message, (words,)), name)
        return tf.reshape(gathered, (self.collectives.size, words))

    def _mean(self, bucket: Bucket, messages: tf.Tensor) -> tf.Tensor:
        """The mean of what all ranks sent."""
        if bucket.kind[-1] == DENSE:
            return messages
        ranks = self.collectives.size
        total = tf.zeros((bucket.numel,), self._dtype(bucket))
        total = kernels.add_up(messages, self._layout(bucket), kernels.wire_dtype(self.config),
                               ranks, total)
        return total / ranks if ranks > 1 else total

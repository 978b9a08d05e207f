"""TopK with error feedback: what each rank sends of its gradient, and the mean of what all sent.

compensate (g + e) -> select -> keep the rest -> pack -> allgather -> add up -> mean
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf

from hvd_ext.agreement import describe
from hvd_ext.buckets import Bucket, TensorSpec
from hvd_ext.exclude import check_names
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reducers import topk_kernels as kernels
from hvd_ext.tensorflow.reducers.base import MakeVariable
from hvd_ext.tensorflow.reducers.buckets import BucketReducer
from hvd_ext.tensorflow.variables import name_of
from hvd_ext.topk import Layout, TopK
from hvd_ext.topk.plan import DENSE, TOPK, Segment, check_bucket, route, segments


class TopKReducer(BucketReducer):
    """The reducer of ``compression=hvd.Compression.topk(...)``: SPARS-AMS Algorithm 1, lines 7-12.

    A step in which some rank's gradient is not finite is skipped by all; e stays what it was.
    Residuals are float32, float64 for float64 gradients. With a ratio that is a function of the step
    the selection runs in Python, operation by operation, as the lengths are not known before.
    """

    def __init__(self, collectives: Collectives, prefix: str, config: TopK, **options: Any) -> None:
        super().__init__(collectives, prefix, settings=describe(config),
                         bucket_bytes=config.bucket_bytes, **options)
        self.config = config
        self.residual: dict[int, tf.Variable] = {}
        self.skipped_steps: Any = None
        self.kept: Any = None  # entries that this rank sent at the last step

    def build(self, variables: Sequence[Any], make_variable: MakeVariable) -> None:
        check_names(self.config.exclude, [name_of(variable) for variable in variables])
        super().build(variables, make_variable)

    def spec(self, variable: Any) -> TensorSpec:
        plain = super().spec(variable)
        kind = replace(plain.kind, route=route(plain.name, plain.shape, self.config))
        return replace(plain, kind=kind)

    def make_state(self, make_variable: MakeVariable) -> None:
        self.skipped_steps = make_variable((), tf.int64, "skipped_steps", False)
        self.kept = tf.Variable(0, dtype=tf.int64, trainable=False)
        for bucket in self.buckets:
            check_bucket(bucket, self.specs[bucket.slots[0].index].name)
            if bucket.kind.route == TOPK and self.config.error_feedback:
                self.residual[bucket.index] = make_variable(
                    (bucket.numel,), self._dtype(bucket), f"residual_{bucket.index}", True)

    def per_rank_state(self) -> list[tf.Variable]:
        return list(self.residual.values())

    def _dtype(self, bucket: Bucket) -> tf.DType:
        return tf.float64 if bucket.kind.dtype == "float64" else tf.float32

    def _segments(self, bucket: Bucket, ratio: float) -> list[Segment]:
        return segments(bucket, ratio, per_tensor=self.config.per_tensor)

    def _layout(self, bucket: Bucket, ratio: float) -> Layout:
        return Layout(sum(part.k for part in self._segments(bucket, ratio)), self.config.values)

    # The step

    def exchange(self, flats: list[tf.Tensor], **inputs: Any) -> tuple[list[tf.Tensor], Any]:
        step = self.steps.read_value() + self.skipped_steps.read_value()
        finite = tf.constant(True)
        sent: list[_Sent] = []
        for bucket, gradient in zip(self.buckets, flats, strict=True):
            one = self._whole(gradient) if bucket.kind.route == DENSE \
                else self._compress(bucket, self._total(bucket, gradient), step)
            sent.append(one)
            finite = tf.logical_and(finite, one.finite)
        received = [self._send(bucket, one) for bucket, one in zip(self.buckets, sent, strict=True)]
        good = self._agree_to_go_on(finite, step)
        for bucket, gradient, one in zip(self.buckets, flats, sent, strict=True):
            if bucket.index in self.residual:
                tf.cond(good, functools.partial(self._keep, bucket, gradient, one),
                        lambda: tf.constant(False))
        self.kept.assign(tf.add_n([tf.cast(one.count, tf.int64) for one in sent]))
        self.steps.assign_add(tf.cast(good, tf.int64))
        self.skipped_steps.assign_add(1 - tf.cast(good, tf.int64))
        return [self._mean(bucket, one, messages) for bucket, one, messages
                in zip(self.buckets, sent, received, strict=True)], good

    def _total(self, bucket: Bucket, gradient: tf.Tensor) -> kernels.Total:
        residual = self.residual.get(bucket.index)
        if residual is None:
            return kernels.Total(tf.cast(gradient, self._dtype(bucket)), None)
        return kernels.Total(gradient, residual.read_value())

    def _whole(self, gradient: tf.Tensor) -> _Sent:
        fine = tf.reduce_all(tf.math.is_finite(gradient))
        return _Sent(gradient, tf.constant([], tf.int32), gradient[:0], tf.constant(0), fine)

    def _compress(self, bucket: Bucket, total: kernels.Total, step: tf.Tensor) -> _Sent:
        """Choose from g + e; the message and what stays."""
        if not callable(self.config.ratio):
            ratio = self.config.ratio_at(0)
            return self._compress_at(bucket, total, step, ratio, self._layout(bucket, ratio).k)

        def now(step_now: tf.Tensor, gradient: tf.Tensor, *residual: tf.Tensor) -> _Sent:
            ratio = self.config.ratio_at(int(step_now))
            # XLA compiles anew for each length: few of them, then.
            room = 2 ** math.ceil(math.log2(self._layout(bucket, ratio).k))
            return self._compress_at(bucket, kernels.Total(gradient, *(residual or (None,))),
                                     step_now, ratio, room)

        given = [step, *(tensor for tensor in total if tensor is not None)]
        one = _Sent(*tf.py_function(now, given, [tf.int32, tf.int32, self._dtype(bucket), tf.int32,
                                                 tf.bool]))
        shapes = ((None,), (None,), (None,), (), ())
        return _Sent(*(tf.ensure_shape(tensor, shape)
                       for tensor, shape in zip(one, shapes, strict=True)))

    def _compress_at(self, bucket: Bucket, total: kernels.Total, step: tf.Tensor, ratio: float,
                     room: int) -> _Sent:
        chosen = kernels.select(total, self._segments(bucket, ratio), self.config,
                                (self.config.seed, bucket.index), step)
        values, left = kernels.split(chosen.exact, kernels.wire_dtype(self.config))
        message = kernels.pack(chosen.positions, values, self._layout(bucket, ratio))
        count = tf.size(chosen.positions)
        behind = [[0, room - count]]
        places = tf.pad(chosen.positions, behind, constant_values=bucket.numel)
        return _Sent(message, tf.ensure_shape(places, (room,)),
                     tf.ensure_shape(tf.pad(left, behind), (room,)), count, chosen.finite)

    def _send(self, bucket: Bucket, one: _Sent) -> tf.Tensor:
        name = f"{self.prefix}/topk/bucket{bucket.index}"
        ranks = self.collectives.size
        if bucket.kind.route == DENSE:
            return one.message if ranks == 1 else self.collectives.allreduce(
                one.message, name, op=horovod.Average, kind="dense")
        if ranks == 1:
            return one.message[None]
        if not callable(self.config.ratio):
            layout = self._layout(bucket, self.config.ratio_at(0))
            gathered = self.collectives.allgather(one.message, name, kind=layout.parts(),
                                                  rows=ranks * layout.words)
            return tf.reshape(gathered, (ranks, layout.words))
        layout = Layout(tf.cast(one.message[1], tf.int64), self.config.values)
        gathered = self.collectives.allgather(one.message, name, kind=layout.parts())
        words = tf.size(one.message)
        check = tf.debugging.Assert(tf.equal(tf.size(gathered), ranks * words), [
            "the ranks' TopK messages have different lengths: make a ratio that is a function "
            "depend on the step alone; words of this one and of all:", words, tf.size(gathered)])
        with tf.control_dependencies([check] if check is not None else []):
            return tf.reshape(gathered, (ranks, words))

    def _agree_to_go_on(self, finite: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """Whether all ranks have finite gradients; an error on all where their ratios differ."""
        if not callable(self.config.ratio):
            return tf.reduce_all(self.agree([finite])[:, 0] == 1.0)
        ratio = tf.numpy_function(lambda now: np.float64(self.config.ratio_at(int(now))), [step],
                                  tf.float64)
        rows = self.agree([finite, tf.ensure_shape(ratio, ())])
        check = tf.debugging.Assert(tf.reduce_all(rows[:, 1] == rows[0, 1]), [
            "the ranks' TopK ratios differ at this step: make a ratio that is a function depend on "
            "the step alone; ratios by rank:", rows[:, 1]])
        with tf.control_dependencies([check] if check is not None else []):
            return tf.reduce_all(rows[:, 0] == 1.0)

    def _keep(self, bucket: Bucket, gradient: tf.Tensor, one: _Sent) -> tf.Tensor:
        residual = self.residual[bucket.index]
        residual.assign(kernels.new_residual(gradient, residual.read_value(), one.places, one.left))
        return tf.constant(True)

    def _mean(self, bucket: Bucket, one: _Sent, messages: tf.Tensor) -> tf.Tensor:
        """The mean of what all ranks sent."""
        if bucket.kind.route == DENSE:
            return messages
        by_step = callable(self.config.ratio)
        layout = Layout(messages[0, 1], self.config.values) if by_step \
            else self._layout(bucket, self.config.ratio_at(0))
        positions, values = kernels.unpack(messages, layout, kernels.wire_dtype(self.config))
        if by_step:  # to the few lengths that XLA compiles for
            behind = [[0, 0], [0, tf.size(one.places) - layout.k]]
            positions, values = tf.pad(positions, behind), tf.pad(values, behind)
        positions, values = (tf.ensure_shape(tensor, (self.collectives.size, None))
                             for tensor in (positions, values))
        return kernels.mean_of(positions, values, bucket.numel, self._dtype(bucket))


class _Sent(NamedTuple):
    """A bucket's message, and what stays of what it holds.

    ``places`` are the positions sent and ``left`` the new e there, both padded, the positions with
    the bucket's length; ``count`` how many were sent; ``finite`` whether all of g + e is.
    """

    message: tf.Tensor
    places: tf.Tensor
    left: tf.Tensor
    count: tf.Tensor
    finite: tf.Tensor

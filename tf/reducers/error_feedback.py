"""Reducers that send less than the gradient and keep the rest: error feedback, whatever the method.

compensate (g + e) -> compress and send -> the mean of what all ranks sent -> keep the rest as e
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf

from hvd_ext.reducers.buckets import DENSE, Bucket, BucketKey
from hvd_ext.reducers.error_feedback import RESIDUAL, SKIPPED_STEPS
from hvd_ext.reducers.filters import check_names
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reducers.base import MakeVariable
from hvd_ext.tensorflow.reducers.buckets import BucketReducer, Started, read_counter
from hvd_ext.tensorflow.variables import name_of


class DenseBucket(NamedTuple):
    """A bucket that is sent whole: the mean over the ranks, and whether this rank's is finite."""

    mean: tf.Tensor
    finite: tf.Tensor


class FeedbackReducer(BucketReducer):
    """What is common to compressions with error feedback, such as TopK.

    A step in which some rank's gradient is not finite is skipped by all ranks; the residual e is
    then what it was. Residuals are float32, float64 for float64 gradients.

    The settings have ``should_compress(name, shape)``, ``exclude`` and ``error_feedback``.
    """

    def __init__(self, collectives: Collectives, settings: Any, options: ReductionOptions) -> None:
        super().__init__(collectives, settings, options)
        self.skipped_steps: Any = None
        self.residual: dict[int, tf.Variable] = {}

    # What a subclass says

    @abc.abstractmethod
    def compress(self, bucket: Bucket, gradient: tf.Tensor, residual: tf.Tensor | None) -> Any:
        """Compress g + e of a bucket, (numel,) each, and start its exchange.

        Returns something with an attribute ``finite``, a 0-D bool: whether this rank's g + e is.
        Where it is not, anything of the usual size is sent: the step is going to be skipped.
        """

    @abc.abstractmethod
    def decompress(self, sent: Sequence[tuple[Bucket, Any]], good: tf.Tensor) -> list[tf.Tensor]:
        """The mean over the ranks of every compressed bucket, (numel,), the same on every rank.

        ``sent`` holds what ``send`` returned; ``good`` says whether the step is taken.
        """

    @abc.abstractmethod
    def new_residual(self, bucket: Bucket, sent: Any, residual: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
        """The new residual: what this rank did not send of g + ``residual``."""

    def is_compressed(self, variable: Any) -> bool:
        """Whether the variable's gradient is compressed; otherwise it is sent whole."""
        return bool(self.settings.should_compress(name_of(variable), tuple(variable.shape)))

    def agreement_values(self) -> list[tf.Tensor]:
        """Further numbers that must be the same on every rank at each step."""
        return []

    # Planning

    def create_state(self, variables: Sequence[Any], make_variable: MakeVariable) -> None:
        check_names(self.settings.exclude, [name_of(variable) for variable in variables])
        super().create_state(variables, make_variable)

    def bucket_key(self, variable: Any) -> BucketKey:
        route = self.settings.label if self.is_compressed(variable) else DENSE
        return replace(super().bucket_key(variable), route=route)

    def make_state(self, make_variable: MakeVariable) -> None:
        self.skipped_steps = self.make_part(make_variable, SKIPPED_STEPS)
        if self.settings.error_feedback:
            for bucket in self.compressed_buckets():
                self.residual[bucket.index] = self.make_part(
                    make_variable, RESIDUAL, (bucket.numel,), self.residual_dtype(bucket), bucket.index)

    def compressed_buckets(self) -> list[Bucket]:
        """The buckets that are not sent whole."""
        return [bucket for bucket in self.buckets if bucket.kind.route != DENSE]

    def residual_dtype(self, bucket: Bucket) -> tf.DType:
        """The precision of g + e."""
        return tf.float64 if bucket.kind.dtype == "float64" else tf.float32

    def step_index(self) -> tf.Tensor:
        """Steps before this one, taken or skipped; 0-D int64."""
        return self.steps.read_value() + self.skipped_steps.read_value()

    # The exchange

    def start_exchange(self, bucket: Bucket, part: int, flat: tf.Tensor) -> Any:
        if bucket.kind.route != DENSE:
            residual = self.residual.get(bucket.index)
            return self.compress(bucket, flat, None if residual is None else self.without_left_out(
                bucket, residual.read_value()))
        mean = flat if self.collectives.size == 1 else self.collectives.allreduce(
            flat, self.bucket_name(bucket), op=horovod.Average, kind="dense")
        return DenseBucket(mean, tf.reduce_all(tf.math.is_finite(flat)))

    def bucket_name(self, bucket: Bucket) -> str:
        """The bucket's name in the timeline."""
        return f"{self.prefix}/{self.settings.label}/bucket{bucket.index}"

    def finish_exchange(self, started: Started, **inputs: Any) -> tuple[list[tf.Tensor], Any]:
        good = self._agree_to_go_on(tf.reduce_all([one.finite for one in started.values()]))
        sent = [(bucket, started[bucket.index, 0]) for bucket in self.compressed_buckets()]
        means = {bucket.index: mean for (bucket, _), mean
                 in zip(sent, self.decompress(sent, good), strict=True)}
        for bucket, one in sent:
            if bucket.index in self.residual:
                tf.cond(good, functools.partial(self._keep_state, bucket, one, means[bucket.index]),
                        lambda: tf.constant(False))
        return [means[bucket.index] if bucket.index in means else started[bucket.index, 0].mean
                for bucket in self.buckets], good

    def count_step(self, good: tf.Tensor) -> None:
        super().count_step(good)
        self.skipped_steps.assign_add(1 - tf.cast(good, tf.int64))

    def _keep_state(self, bucket: Bucket, sent: Any, mean: tf.Tensor) -> tf.Tensor:
        residual = self.residual[bucket.index]
        before = residual.read_value()
        after = self.new_residual(bucket, sent, self.without_left_out(bucket, before), mean)
        residual.assign(self.keep_left_out(bucket, after, before))
        return tf.constant(True)

    def _agree_to_go_on(self, finite: tf.Tensor) -> tf.Tensor:
        """Whether all ranks have finite gradients; an error on all where ``agreed`` differ."""
        rows = self.agree([finite, *self.agreement_values()])
        check = tf.debugging.Assert(tf.reduce_all(rows[:, 1:] == rows[0, 1:]), [
            "the ranks' settings differ at this step (the TopK ratio, where there is one): make "
            "settings that are functions depend on the step alone; by rank:", rows[:, 1:]])
        with tf.control_dependencies([check] if check is not None else []):
            return tf.reduce_all(rows[:, 0] == 1.0)

    # Figures

    def report(self) -> dict[str, Any]:
        """Figures of the last step; norms are of this rank's residual."""
        taken = self.step_taken()
        norms = [float(np.linalg.norm(residual.numpy().astype(np.float64)))
                 for residual in self.residual.values()]
        figures = {} if taken is None else {"step_taken": taken, **self.step_metrics()}
        return {**super().report(), **figures, "skipped_steps": read_counter(self.skipped_steps),
                "residual_norm": math.hypot(*norms), "dropped_residuals": self.lost_ranks,
                "compressed_elements": self.count_elements(compressed=True),
                "dense_elements": self.count_elements(compressed=False)}

    def step_metrics(self) -> dict[str, Any]:
        """Further figures of the last step."""
        return {}

    def count_elements(self, *, compressed: bool) -> int:
        """Elements of the tensors that are compressed, or of those that are sent whole."""
        return sum(b.numel for b in self.buckets if (b.kind.route != DENSE) is compressed)

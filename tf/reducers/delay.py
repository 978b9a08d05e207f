"""Delay-compensated reduction at the price of an allreduce: slices out, recursion, slices back.

Of every bucket rank s receives slice s of every rank's gradient (alltoall); the ranks exchange the
lengths of their steps, from which all derive the same order; each runs the recursion on its slice,
and the reduced slices are gathered. Out and back together move ``2 (M-1)/M`` of the bucket's
bytes, what a ring allreduce moves.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hvd_ext.buckets import slice_sizes
from hvd_ext.delay import DelayCompensated
from hvd_ext.tensorflow.collectives import NARROW, Collectives
from hvd_ext.tensorflow.reducers.base import MakeVariable
from hvd_ext.tensorflow.reducers.buckets import BucketReducer
from hvd_ext.tensorflow.reducers.delay_kernels import accumulation_dtype, reduced_slice, square_norms


class DelayReducer(BucketReducer):
    """The reducer of ``op=hvd.DelayCompensated(...)``.

    Args:
        collectives: the ranks to reduce over.
        prefix: of the names in the timeline.
        config: the method's settings.
        parts: micro-batches that are workers of their own, along the gradients' first axis; 1
            when each rank is one worker.
        mean_of_parts: divide the sum over micro-batches by their number; otherwise the losses
            were divided by it.
        half: send float16.
    """

    def __init__(self, collectives: Collectives, prefix: str, config: DelayCompensated, *,
                 parts: int = 1, mean_of_parts: bool = False, half: bool = False,
                 **options: Any) -> None:
        super().__init__(collectives, prefix, settings=(config, parts, half), **options)
        self.config = config
        self.parts = parts
        self.mean_of_parts = mean_of_parts
        self.half = half
        self.unusable_steps: Any = None
        self.mean_square: dict[int, tf.Variable] = {}

    def make_state(self, make_variable: MakeVariable) -> None:
        self.unusable_steps = make_variable((), tf.int64, "unusable_steps", False)
        if not self.config.keeps_mean_square:
            return
        for bucket in self.buckets:
            dtype = accumulation_dtype(tf.as_dtype(bucket.kind.dtype))
            own = slice_sizes(bucket.numel, self.collectives.size)[self.collectives.rank]
            self.mean_square[bucket.index] = make_variable(
                (own,), dtype, f"mean_square_{bucket.index}", True)

    def per_rank_state(self) -> list[tf.Variable]:
        return list(self.mean_square.values())

    def inputs(self, optimizer: Any) -> dict[str, tf.Tensor]:
        return {"lr": tf.cast(optimizer.learning_rate, tf.float32)}

    def parts_shape(self) -> tuple[int, ...]:
        return (self.parts,) if self.parts > 1 else ()

    def exchange(self, flats: list[tf.Tensor], **inputs: Any) -> tuple[list[tf.Tensor], Any]:
        lr = inputs["lr"]
        ranks, parts = self.collectives.size, self.parts
        if ranks * parts == 1:
            return flats, None
        dtypes = [flat.dtype for flat in flats]
        flats = [tf.reshape(self._narrow(flat), (parts, -1)) for flat in flats]
        received = [self._slices(flat, bucket) for flat, bucket in zip(flats, self.buckets, strict=True)]
        squares = sum(square_norms(flat) for flat in flats)
        squares = tf.reshape(self.agree(tf.unstack(squares * tf.cast(lr, tf.float64) ** 2,
                                                   num=parts)), [-1])
        good = tf.reduce_all(tf.math.is_finite(squares))
        order = tf.range(ranks * parts)
        if self.config.order == "norm":
            sorted_order = tf.argsort(squares, stable=True, direction="ASCENDING")
            order = tf.where(good, sorted_order, order)
        slices = [tf.cast(self._reduce_slice(rows, bucket, order, good, lr), dtype)
                  for rows, bucket, dtype in zip(received, self.buckets, dtypes, strict=True)]
        self.steps.assign_add(tf.cast(good, tf.int64))
        self.unusable_steps.assign_add(1 - tf.cast(good, tf.int64))
        return [self._gather(own, bucket)
                for own, bucket in zip(slices, self.buckets, strict=True)], None

    def _narrow(self, flat: tf.Tensor) -> tf.Tensor:
        if self.half:
            return tf.cast(flat, tf.float16)
        return tf.cast(flat, tf.float32) if flat.dtype in NARROW else flat

    def _slices(self, flat: tf.Tensor, bucket: Any) -> tf.Tensor:
        """(M * parts, own): every worker's gradient of this rank's slice, by rank and part."""
        if self.collectives.size == 1:
            return flat
        splits = slice_sizes(bucket.numel, self.collectives.size)
        own = splits[self.collectives.rank]
        by_part = [
            tf.reshape(self.collectives.alltoall(
                part, splits, f"{self.prefix}/delay/bucket{bucket.index}/part{number}",
                rows=self.collectives.size * own),
                (self.collectives.size, own))
            for number, part in enumerate(self._parts(flat))]
        return tf.reshape(tf.stack(by_part, axis=1), (self.collectives.size * self.parts, own))

    def _parts(self, flat: tf.Tensor) -> list[tf.Tensor]:
        """The rows, without a copy where there is one only."""
        return [tf.reshape(flat, [-1])] if self.parts == 1 else tf.unstack(flat, num=self.parts)

    def _reduce_slice(self, rows: tf.Tensor, bucket: Any, order: tf.Tensor, good: tf.Tensor,
                      lr: tf.Tensor) -> tf.Tensor:
        before = self.mean_square.get(bucket.index)
        divisor = self.collectives.size * (self.parts if self.mean_of_parts else 1)
        total, after = reduced_slice(
            rows, order, good, lr / rows.shape[0], None if before is None else before.read_value(),
            self.config, 1.0 if self.mean_of_parts else float(self.parts), divisor)
        if before is not None:
            before.assign(after)
        return total

    def _gather(self, own: tf.Tensor, bucket: Any) -> tf.Tensor:
        if self.collectives.size == 1:
            return own
        wide = self._narrow(own)
        gathered = self.collectives.allgather(
            wide, f"{self.prefix}/delay/bucket{bucket.index}/reduced", rows=bucket.numel)
        return tf.cast(gathered, own.dtype)

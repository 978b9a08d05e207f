"""Delay-compensated reduction at the price of an allreduce: slices out, recursion, slices back.

Of every bucket rank s receives slice s of every rank's gradient (alltoall); the ranks exchange the
lengths of their steps, from which all derive the same order; each runs the recursion on its slice,
and the reduced slices are gathered. Out and back together move ``2 (M-1)/M`` of the bucket's
bytes, what a ring allreduce moves.

Where the order is that of the ranks, a bucket goes back as soon as it has arrived.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from hvd_ext.reducers.buckets import Bucket, check_message, slice_sizes
from hvd_ext.reducers.delay_compensation import MEAN_SQUARE, UNUSABLE_STEPS, DelayCompensated
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.tensorflow.collectives import NARROW, Collectives
from hvd_ext.tensorflow.reducers.base import MakeVariable
from hvd_ext.tensorflow.reducers.buckets import BucketReducer, Started, read_counter
from hvd_ext.tensorflow.reducers.kernels.delay_compensation import (
    accumulation_dtype,
    reduced_slice,
    square_norms,
)


class InFlightBucket(NamedTuple):
    """A bucket on its way: its squared norm, 0-D, and (M, own) every rank's gradient of this slice."""

    square: tf.Tensor
    received: tf.Tensor


class DelayReducer(BucketReducer):
    """The reducer of ``op=hvd.DelayCompensated(...)``.

    With ``options.half`` float16 travels; the recursion runs in float32 (float64 for float64
    gradients) whatever travels.
    """

    settings: DelayCompensated

    def __init__(self, collectives: Collectives, settings: DelayCompensated,
                 options: ReductionOptions) -> None:
        if settings.virtual_workers == "microbatch" and options.passes == 1:
            raise ValueError(
                "virtual_workers='microbatch' needs backward_passes_per_step above 1, the number of "
                "micro-batches per step; got 1. Pass it, or use virtual_workers='rank'")
        super().__init__(collectives, settings, options)
        self.unusable_steps: Any = None
        self.mean_square: dict[int, tf.Variable] = {}

    @property
    def parts(self) -> int:
        return self.options.passes if self.settings.virtual_workers == "microbatch" else 1

    @property
    def _order_is_fixed(self) -> bool:
        """Whether the order is that of the ranks, whatever their gradients are."""
        return self.settings.order == "rank" and self.parts == 1

    @property
    def _is_alone(self) -> bool:
        """One worker only: its gradient is the result."""
        return self.collectives.size * self.parts == 1

    def make_state(self, make_variable: MakeVariable) -> None:
        self.unusable_steps = self.make_part(make_variable, UNUSABLE_STEPS)
        for bucket in self.buckets:
            check_message(bucket, self.specs, "DelayCompensated")
        if not self.settings.keeps_mean_square:
            return
        for bucket in self.buckets:
            dtype = accumulation_dtype(tf.as_dtype(bucket.kind.dtype))
            first, end = self._own_slice(bucket)
            # Under elastic the slice changes with the ranks: there is room for all of it then.
            numel = bucket.numel if self.collectives.is_elastic else end - first
            self.mean_square[bucket.index] = self.make_part(
                make_variable, MEAN_SQUARE, (numel,), dtype, bucket.index, bucket.numel)

    def _own_slice(self, bucket: Bucket) -> tuple[int, int]:
        """Where this rank's slice of the bucket begins and ends."""
        sizes = slice_sizes(bucket.numel, self.collectives.size)
        first = sum(sizes[:self.collectives.rank])
        return first, first + sizes[self.collectives.rank]

    def gather_state(self, collectives: Collectives) -> None:
        for bucket in self.buckets:
            whole = self.mean_square.get(bucket.index)
            if whole is not None:
                first, end = self._own_slice(bucket)
                name = f"{self.prefix}/mean_square{bucket.index}"
                whole.assign(collectives.allgather(whole[first:end], name, rows=bucket.numel))

    def step_inputs(self, optimizer: Any) -> dict[str, tf.Tensor]:
        lr = tf.convert_to_tensor(optimizer.learning_rate)
        return {"lr": tf.cast(lr, accumulation_dtype(lr.dtype))}

    # The exchange

    def start_exchange(self, bucket: Bucket, part: int, flat: tf.Tensor) -> Any:
        if self._is_alone:
            return flat
        sent = self._to_half(flat)
        ranks = self.collectives.size
        received = sent[None]
        if ranks > 1:
            splits = slice_sizes(bucket.numel, ranks)
            own = splits[self.collectives.rank]
            received = tf.reshape(self.collectives.alltoall(
                sent, splits, f"{self.prefix}/delay/bucket{bucket.index}/part{part}",
                rows=ranks * own), (ranks, own))
        return InFlightBucket(square_norms(sent), received)

    def finish_exchange(self, started: Started, **inputs: Any) -> tuple[list[tf.Tensor], Any]:
        if self._is_alone:
            return [started[bucket.index, 0] for bucket in self.buckets], None
        lr, order = inputs["lr"], tf.range(self.collectives.size * self.parts)
        if self._order_is_fixed:
            slices = [self._reduce_slice(bucket, started, order, tf.constant(True), lr)
                      for bucket in self.buckets]
            reduced = [self._gather_parts(*pair) for pair in zip(slices, self.buckets, strict=True)]
            # What ends the step on every rank comes last, when no rank waits for another.
            with tf.control_dependencies(reduced):
                good = tf.reduce_all(tf.math.is_finite(self._agreed_squares(started, lr)))
            with tf.control_dependencies([good]):
                reduced = [tf.identity(one) for one in reduced]
        else:
            squares = self._agreed_squares(started, lr)
            good = tf.reduce_all(tf.math.is_finite(squares))
            if self.settings.order == "norm":
                sorted_order = tf.argsort(squares, stable=True, direction="ASCENDING")
                order = tf.where(good, sorted_order, order)
            slices = [self._reduce_slice(bucket, started, order, good, lr) for bucket in self.buckets]
            reduced = [self._gather_parts(*pair) for pair in zip(slices, self.buckets, strict=True)]
        for bucket, (_, after) in zip(self.buckets, slices, strict=True):
            self._keep_state(bucket, after, good)
        self._usable = good
        return reduced, None

    def count_step(self, good: None) -> None:
        """Every step is taken; one whose gradients are not finite counts as unusable."""
        if self._is_alone:
            super().count_step(None)
            return
        super().count_step(self._usable)
        self.unusable_steps.assign_add(1 - tf.cast(self._usable, tf.int64))

    def _agreed_squares(self, started: Started, lr: tf.Tensor) -> tf.Tensor:
        """The squared lengths of all workers' steps; an error on all ranks whose learning rates differ."""
        squares = [tf.add_n([started[bucket.index, part].square for bucket in self.buckets])
                   for part in range(self.parts)]
        lr_square = tf.cast(lr, tf.float64) ** 2
        rows = self.agree([lr, *(square * lr_square for square in squares)])
        check = tf.debugging.Assert(tf.reduce_all(rows[:, 0] == rows[0, 0]), [
            "the ranks' learning rates differ at this step, which DelayCompensated needs to be the same: "
            "give every rank the same schedule and state; by rank:", rows[:, 0]])
        with tf.control_dependencies([check] if check is not None else []):
            return tf.reshape(rows[:, 1:], [-1])

    def _to_half(self, flat: tf.Tensor) -> tf.Tensor:
        if self.options.half:
            return tf.cast(flat, tf.float16)
        return tf.cast(flat, tf.float32) if flat.dtype in NARROW else flat

    def _reduce_slice(self, bucket: Bucket, started: Started, order: tf.Tensor, good: tf.Tensor,
                      lr: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """This rank's slice of the bucket, reduced, and MeanSquare after it."""
        by_part = [started[bucket.index, part].received for part in range(self.parts)]
        rows = by_part[0]
        if self.parts > 1:  # by rank and then by part
            rows = tf.reshape(tf.stack(by_part, axis=1), (-1, by_part[0].shape[1]))
        kept = self.mean_square.get(bucket.index)
        first, end = self._own_slice(bucket) if self.collectives.is_elastic else (0, None)
        before = None if kept is None else kept.read_value()[first:end]
        mean_of_parts = self.options.average_passes and self.parts > 1
        divisor = self.collectives.size * (self.parts if mean_of_parts else 1)
        total, after = reduced_slice(
            rows, order, good, lr / (self.collectives.size * self.parts),
            before, self.settings,
            1.0 if mean_of_parts else float(self.parts), divisor)
        return tf.cast(total, tf.as_dtype(bucket.kind.dtype)), after

    def _keep_state(self, bucket: Bucket, after: tf.Tensor | None, good: tf.Tensor) -> None:
        """Let MeanSquare be what a step has made of it; what it was, unless the step was good."""
        if after is None:
            return
        kept = self.mean_square[bucket.index]
        first, end = self._own_slice(bucket) if self.collectives.is_elastic else (0, None)
        if any(slot.index in self.left_out for slot in bucket.slots):
            after = self._with_left_out(bucket, after, kept.read_value()[first:end])
        if self._order_is_fixed:  # otherwise the kernel has known it
            after = tf.where(good, after, kept.read_value()[first:end])
        if self.collectives.is_elastic:
            kept[first:end].assign(after)
        else:
            kept.assign(after)

    def _with_left_out(self, bucket: Bucket, after: tf.Tensor, before: tf.Tensor) -> tf.Tensor:
        """This rank's slice of MeanSquare, as it was where variables are left out."""
        first, end = self._own_slice(bucket)
        pieces = []
        for slot in bucket.slots:
            begin, stop = max(slot.offset, first), min(slot.offset + slot.numel, end)
            if begin < stop:
                source = before if slot.index in self.left_out else after
                pieces.append(source[begin - first:stop - first])
        return tf.concat(pieces, axis=0)

    def _gather_parts(self, reduced: tuple[tf.Tensor, tf.Tensor | None], bucket: Bucket) -> tf.Tensor:
        own, _ = reduced
        if self.collectives.size == 1:
            return own
        gathered = self.collectives.allgather(
            self._to_half(own), f"{self.prefix}/delay/bucket{bucket.index}/reduced",
            rows=bucket.numel)
        return tf.cast(gathered, own.dtype)

    def report(self) -> dict[str, Any]:
        return {**super().report(), "workers": self.collectives.size * self.parts,
                "unusable_steps": read_counter(self.unusable_steps)}

"""TopK with error feedback: what each rank sends of its gradient, and the mean of what all sent.

compensate (g + e) -> select -> keep the rest -> pack -> allgather -> add up -> mean

or, with ``exchange="sparse_allreduce"``, what ``topk_sparse.py`` does with what was selected.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hvd_ext.reducers.buckets import DENSE, Bucket
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.reducers.topk import Layout, TopK
from hvd_ext.reducers.topk.exchange_choice import select_exchange
from hvd_ext.reducers.topk.plan import Segment, check_bucket, plan_segments
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reducers.base import MakeVariable
from hvd_ext.tensorflow.reducers.error_feedback import FeedbackReducer
from hvd_ext.tensorflow.reducers.kernels import topk as kernels
from hvd_ext.tensorflow.reducers.topk_allreduce import OwnerReply, SparseAllreduce


class PaddedSelection(NamedTuple):
    """A bucket's message, and what stays of what it holds.

    ``places`` are the positions sent and ``left`` the new e there, both padded, the positions with
    the bucket's length; ``count`` how many were sent; ``finite`` whether all of g + e is.
    """

    message: tf.Tensor
    places: tf.Tensor
    left: tf.Tensor
    count: tf.Tensor
    finite: tf.Tensor


class InFlightTopK(NamedTuple):
    """A bucket on its way: its gradient, what was chosen, and all ranks' messages.

    ``messages`` is (M, words), or by sparse allreduce (words,): those to this rank as an owner.
    """

    gradient: tf.Tensor
    chosen: PaddedSelection
    messages: tf.Tensor

    @property
    def finite(self) -> tf.Tensor:
        """Whether all of this rank's g + e is finite."""
        return self.chosen.finite


class TopKReducer(FeedbackReducer):
    """The reducer of ``compression=hvd.Compression.topk(...)``: SPARS-AMS Algorithm 1, lines 7-12.

    With a ratio that is a function of the step the selection runs in Python, operation by
    operation, as the lengths are not known before.
    """

    settings: TopK

    def __init__(self, collectives: Collectives, settings: TopK, options: ReductionOptions) -> None:
        super().__init__(collectives, settings, options)
        self.kept: Any = None  # entries that this rank sent at the last step
        self.sparse = SparseAllreduce(collectives, settings)
        self._answered: dict[int, OwnerReply] = {}  # of the step that is being traced

    def make_state(self, make_variable: MakeVariable) -> None:
        super().make_state(make_variable)
        self.kept = tf.Variable(0, dtype=tf.int64, trainable=False)
        for bucket in self.buckets:
            check_bucket(bucket, self.specs[bucket.slots[0].index].name)
            if self._is_sparse(bucket):
                self.sparse.create_state(bucket, self.residual_dtype(bucket),
                                         functools.partial(self.make_part, make_variable))

    def _is_sparse(self, bucket: Bucket) -> bool:
        """Whether the bucket travels by sparse allreduce; the same on every rank, and at every step."""
        if bucket.kind.route == DENSE:
            return False
        k = sum(one.k for one in self._bucket_segments(bucket, self.settings.ratio_at(0)))
        return select_exchange(self.settings.exchange, self.collectives.size, k,
                               self.settings.values) != "allgather"

    @property
    def _by_step(self) -> bool:
        """Whether the ratio, and with it every length, is known only when the step runs."""
        return callable(self.settings.ratio)

    def _bucket_segments(self, bucket: Bucket, ratio: float) -> list[Segment]:
        return plan_segments(bucket, ratio, per_tensor=self.settings.per_tensor)

    def _message_layout(self, bucket: Bucket, ratio: float) -> Layout:
        return Layout(sum(part.k for part in self._bucket_segments(bucket, ratio)), self.settings.values)

    def agreement_values(self) -> list[tf.Tensor]:
        if not self._by_step:
            return []
        ratio = tf.numpy_function(lambda now: np.float64(self.settings.ratio_at(int(now))),
                                  [self.step_index()], tf.float64)
        return [tf.ensure_shape(ratio, ())]

    # Choosing and sending

    def compress(self, bucket: Bucket, gradient: tf.Tensor, residual: tf.Tensor | None) -> InFlightTopK:
        """Choose from g + e and send what was chosen (lines 7 and 8)."""
        cast = gradient if residual is not None else tf.cast(gradient, self.residual_dtype(bucket))
        chosen = self._choose_entries(bucket, kernels.Total(cast, residual))
        if self._is_sparse(bucket):
            if self.left_out:
                raise NotImplementedError(
                    f"{len(self.left_out)} of {len(self.variables)} variables have no part in this step, as "
                    "Compression.topk(exchange='sparse_allreduce') needs: use exchange='allgather' where "
                    "layers are frozen during training")
            return InFlightTopK(gradient, chosen,
                                self.sparse.send_to_owners(bucket, chosen.message, self.bucket_name(bucket)))
        return InFlightTopK(gradient, chosen, self._gather_parts(bucket, chosen.message))

    def _choose_entries(self, bucket: Bucket, total: kernels.Total) -> PaddedSelection:
        step = self.step_index()
        if not self._by_step:
            ratio = self.settings.ratio_at(0)
            return self._choose_at(bucket, total, step, ratio, self._message_layout(bucket, ratio).k)

        def now(step_now: tf.Tensor, gradient: tf.Tensor, *residual: tf.Tensor) -> PaddedSelection:
            ratio = self.settings.ratio_at(int(step_now))
            # XLA compiles anew for each length: few of them, then.
            room = 2 ** math.ceil(math.log2(self._message_layout(bucket, ratio).k))
            return self._choose_at(bucket, kernels.Total(gradient, *(residual or (None,))),
                                   step_now, ratio, room)

        given = [step, *(tensor for tensor in total if tensor is not None)]
        chosen = PaddedSelection(*tf.py_function(now, given, [tf.int32, tf.int32, self.residual_dtype(bucket),
                                                              tf.int32, tf.bool]))
        shapes = ((None,), (None,), (None,), (), ())
        return PaddedSelection(*(tf.ensure_shape(tensor, shape)
                                 for tensor, shape in zip(chosen, shapes, strict=True)))

    def _choose_at(self, bucket: Bucket, total: kernels.Total, step: tf.Tensor, ratio: float,
                   room: int) -> PaddedSelection:
        found = kernels.select_entries(total, self._bucket_segments(bucket, ratio), self.settings,
                                       (self.settings.seed, bucket.index), step)
        values, left = kernels.split_selected(found.exact, kernels.wire_dtype(self.settings))
        message = kernels.pack_message(found.positions, values, self._message_layout(bucket, ratio))
        count = tf.size(found.positions)
        behind = [[0, room - count]]
        places = tf.pad(found.positions, behind, constant_values=bucket.numel)
        return PaddedSelection(message, tf.ensure_shape(places, (room,)),
                               tf.ensure_shape(tf.pad(left, behind), (room,)), count, found.finite)

    def _gather_parts(self, bucket: Bucket, message: tf.Tensor) -> tf.Tensor:
        ranks, name = self.collectives.size, self.bucket_name(bucket)
        if ranks == 1:
            return message[None]
        if not self._by_step:
            layout = self._message_layout(bucket, self.settings.ratio_at(0))
            gathered = self.collectives.allgather(message, name, kind=layout.bytes_by_kind(),
                                                  rows=ranks * layout.words)
            return tf.reshape(gathered, (ranks, layout.words))
        layout = Layout(tf.cast(message[1], tf.int64), self.settings.values)
        gathered = self.collectives.allgather(message, name, kind=layout.bytes_by_kind())
        words = tf.size(message)
        check = tf.debugging.Assert(tf.equal(tf.size(gathered), ranks * words), [
            "the ranks' TopK messages have different lengths: make a ratio that is a function "
            "depend on the step alone; words of this one and of all:", words, tf.size(gathered)])
        with tf.control_dependencies([check] if check is not None else []):
            return tf.reshape(gathered, (ranks, words))

    # Adding up

    def decompress(self, sent: Sequence[tuple[Bucket, InFlightTopK]], good: tf.Tensor) -> list[tf.Tensor]:
        """The mean of what all ranks sent (line 12)."""
        counts = [tf.cast(one.chosen.count, tf.int64) for _, one in sent]
        self.kept.assign(tf.add_n(counts) if counts else tf.constant(0, tf.int64))
        sparse = [(bucket, one.messages, self.residual_dtype(bucket), one.chosen.message[1],
                   self.bucket_name(bucket))
                  for bucket, one in sent if self._is_sparse(bucket)]
        self._answered = {bucket.index: answered for (bucket, *_), answered
                          in zip(sparse, self.sparse.finish_exchange(sparse), strict=True)}
        for bucket, *_ in sparse:
            tf.cond(good, functools.partial(self.sparse.keep_state, bucket, self._answered[bucket.index]),
                    lambda: tf.constant(False))
        return [self._answered[bucket.index].mean if bucket.index in self._answered
                else self._mean_over_ranks(bucket, one) for bucket, one in sent]

    def _mean_over_ranks(self, bucket: Bucket, sent: InFlightTopK) -> tf.Tensor:
        messages = sent.messages
        layout = Layout(messages[0, 1], self.settings.values) if self._by_step \
            else self._message_layout(bucket, self.settings.ratio_at(0))
        positions, values = kernels.unpack_messages(messages, layout, kernels.wire_dtype(self.settings))
        if self._by_step:  # to the few lengths that XLA compiles for
            behind = [[0, 0], [0, tf.size(sent.chosen.places) - layout.k]]
            positions, values = tf.pad(positions, behind), tf.pad(values, behind)
        positions, values = (tf.ensure_shape(tensor, (self.collectives.size, None))
                             for tensor in (positions, values))
        return kernels.mean_of(positions, values, bucket.numel, self.residual_dtype(bucket))

    def new_residual(self, bucket: Bucket, sent: InFlightTopK, residual: tf.Tensor,
                     mean: tf.Tensor) -> tf.Tensor:
        rest = kernels.new_residual(sent.gradient, residual, sent.chosen.places, sent.chosen.left)
        if bucket.index not in self._answered:
            return rest
        answered = self._answered[bucket.index]

        def folded() -> tf.Tensor:  # what this rank kept as an owner is part of its e from now on
            places = answered.low + tf.range(tf.size(answered.fold, tf.int64), dtype=tf.int64)
            return tf.tensor_scatter_nd_add(rest, places[:, None], answered.fold)

        return tf.cond(tf.size(answered.fold) > 0, folded, lambda: rest)

    def step_metrics(self) -> dict[str, Any]:
        compressed = self.count_elements(compressed=True)
        return {"ratio": self.settings.ratio_at(int(self.steps) + int(self.skipped_steps) - 1),
                "kept_fraction": int(self.kept) / compressed if compressed else 1.0,
                **self.sparse.step_metrics()}

"""Sparse allreduce of chosen entries: what a rank sends is O(k), however many ranks there are.

entries to the owners of their places (alltoall) -> their mean + what the owner kept -> a threshold for
about k entries in all (allgather of a few numbers) -> the entries above it to all ranks (allgather); the
owner keeps the rest

The class of exchanges of Ok-Topk (Li and Hoefler, PPoPP 2022), with a residual at the owner, so that
nothing is lost: the sum over ranks of e, M times all owners' residuals and M times all that was applied
add up to all gradients so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hvd_ext.reducers.buckets import Bucket
from hvd_ext.reducers.topk import OWNER_BOUNDS, OWNER_CLOCK, OWNER_RESIDUAL, TopK, allreduce
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reducers.kernels import topk_allreduce as kernels


class OwnerState(NamedTuple):
    """What this rank keeps of a bucket.

    ``bounds`` (M + 1,): who owns what; zeros before the first step. ``clock`` (2,): age and wait of the
    bounds. ``residual`` (numel,): zeros outside of this rank's range. All int64 but for the last.
    """

    bounds: tf.Variable
    clock: tf.Variable
    residual: tf.Variable


class OwnerReply(NamedTuple):
    """A bucket after its exchange.

    ``mean`` (numel,) is the reduced gradient. What this rank keeps: ``low``, the first place of its
    range, and ``kept``, the residual there; where ranges change ``fold``, M times that residual, goes
    into e instead, otherwise it is empty. ``bounds`` and ``clock`` are those of the next step.
    """

    mean: tf.Tensor
    low: tf.Tensor
    kept: tf.Tensor
    fold: tf.Tensor
    bounds: tf.Tensor
    clock: tf.Tensor


class SparseAllreduce:
    """The exchange of ``Compression.topk(exchange="sparse_allreduce")``, for one reducer."""

    def __init__(self, collectives: Collectives, settings: TopK) -> None:
        self.collectives = collectives
        self.settings = settings
        self.owned: dict[int, OwnerState] = {}
        self.figures_now: Any = None  # (2,) float64: imbalance of the owners, entries applied

    def create_state(self, bucket: Bucket, dtype: tf.DType, make_part: Callable[..., tf.Variable]) -> None:
        """Make the bucket's state with ``make_part(part, shape, dtype, number)``.

        Raises:
            NotImplementedError: under Horovod elastic, where the number of ranks may change.
        """
        if self.collectives.is_elastic:
            raise NotImplementedError(
                "Compression.topk(exchange='sparse_allreduce') does not follow a change of the number of "
                "ranks under TensorFlow; use exchange='allgather' with Horovod elastic")
        name, ranks = bucket.index, self.collectives.size
        self.owned[name] = OwnerState(make_part(OWNER_BOUNDS, (ranks + 1,), tf.int64, name),
                                      make_part(OWNER_CLOCK, (2,), tf.int64, name),
                                      make_part(OWNER_RESIDUAL, (bucket.numel,), dtype, name))
        if self.figures_now is None:
            self.figures_now = tf.Variable([1.0, 0.0], dtype=tf.float64, trainable=False)

    def send_to_owners(self, bucket: Bucket, message: tf.Tensor, name: str) -> tf.Tensor:
        """Send each entry of a message to the owner of its place; what came here, one after another."""
        def split(bounds: Any, message: Any) -> tuple[Any, Any]:
            return kernels.for_owners(self._current_bounds(bounds, bucket), message, self.settings.values)

        words, splits = self._call_numpy(split, [self.owned[bucket.index].bounds.read_value(), message],
                                         [(tf.int32, (None,)), (tf.int32, (self.collectives.size,))])
        return self.collectives.alltoall(words, splits, name,
                                         kind=kernels.bytes_by_kind(self.settings.values))

    def finish_exchange(self,
                        received: Sequence[tuple[Bucket, tf.Tensor, tf.DType, Any, str]]) -> list[OwnerReply]:
        """What becomes of all buckets' messages.

        Args:
            received: bucket, the messages that came for this rank, the precision of g + e, the entries to
                be sent back by all owners together, and the bucket's name in the timeline.
        """
        if not received:
            return []
        rank, ranks = self.collectives.rank, self.collectives.size
        summed = [self._sum_messages(*one) for one in received]
        rows = tf.stack([row for *_, row in summed])[None]
        told = self.collectives.allgather(rows, f"{received[0][-1]}/thresholds", kind="thresholds",
                                          rows=ranks)
        found, figures = [], []
        for number, ((bucket, _, dtype, k_out, name), (mean, places, _)) in enumerate(
                zip(received, summed, strict=True)):
            owned, table = self.owned[bucket.index], told[:, number]

            def answer(bounds: Any, mean: Any, places: Any, table: Any, k_out: Any,
                       bucket: Bucket = bucket) -> tuple[Any, ...]:
                low, _ = self._bounds_of(bounds, bucket, rank)
                return kernels.build_reply(mean, places, low, table, int(k_out), self.settings.values)

            message, left = self._call_numpy(
                answer, [owned.bounds.read_value(), mean, places, table, tf.cast(k_out, tf.int64)],
                [(tf.int32, (None,)), (dtype, (None,))])
            everyone = self.collectives.allgather(message, f"{name}/means",
                                                  kind=kernels.bytes_by_kind(self.settings.values))

            def finish(bounds: Any, clock: Any, left: Any, table: Any, words: Any,
                       bucket: Bucket = bucket, dtype: tf.DType = dtype, name: str = name
                       ) -> tuple[Any, ...]:
                now = allreduce.OwnerRanges(self._current_bounds(bounds, bucket), int(clock[0]),
                                            max(1, int(clock[1])))
                total, entries = kernels.scatter_entries(words, self.settings.values, ranks, bucket.numel,
                                                         dtype.as_numpy_dtype, f"{name}/means")
                following = now.next_ranges(table)
                low = now.bounds_of(rank)[0]
                moved = following.age == 0
                kept = left if self.settings.error_feedback else np.zeros_like(left)
                fold = ranks * kept if moved else kept[:0]
                return (total, np.int64(low), np.zeros_like(kept) if moved else kept, fold,
                        following.bounds, np.array([following.age, following.wait]),
                        np.array([allreduce.measure_imbalance(table), entries]))

            *answered, figure = self._call_numpy(
                finish, [owned.bounds.read_value(), owned.clock.read_value(), left, table, everyone],
                [(dtype, (bucket.numel,)), (tf.int64, ()), (dtype, (None,)), (dtype, (None,)),
                 (tf.int64, (ranks + 1,)), (tf.int64, (2,)), (tf.float64, (2,))])
            found.append(OwnerReply(*answered))
            figures.append(figure)
        self.figures_now.assign([tf.reduce_max([one[0] for one in figures]),
                                 tf.add_n([one[1] for one in figures])])
        return found

    def _sum_messages(self, bucket: Bucket, messages: tf.Tensor, dtype: tf.DType, k_out: Any,
                      name: str) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The means in this rank's range, the candidates among them, and what this rank tells of them."""
        rank, ranks, owned = self.collectives.rank, self.collectives.size, self.owned[bucket.index]

        def add(bounds: Any, residual: Any, messages: Any, k_out: Any) -> tuple[Any, ...]:
            bounds = self._current_bounds(bounds, bucket)
            low, high = int(bounds[rank]), int(bounds[rank + 1])
            return kernels.sum_up(messages, residual[low:high], low, allreduce.count_bins(bounds)[rank],
                                  ranks,
                                  int(k_out), self.settings.values, name)

        return self._call_numpy(add, [owned.bounds.read_value(), owned.residual.read_value(), messages,
                                      tf.cast(k_out, tf.int64)],
                                [(dtype, (None,)), (tf.int64, (None,)), (tf.float64, (allreduce.WORDS,))])

    def keep_state(self, bucket: Bucket, answered: OwnerReply) -> tf.Tensor:
        """Keep what the step leaves; called where the step is taken."""
        owned = self.owned[bucket.index]
        owned.bounds.assign(answered.bounds)
        owned.clock.assign(answered.clock)
        if self.settings.error_feedback:
            high = answered.low + tf.size(answered.kept, tf.int64)
            owned.residual[answered.low:high].assign(answered.kept)
        return tf.constant(True)

    def step_metrics(self) -> dict[str, Any]:
        """Of the last step; nothing where no bucket travels so."""
        if not self.owned:
            return {}
        imbalance, entries = self.figures_now.numpy()
        norms = [np.linalg.norm(owned.residual.numpy().astype(np.float64)) for owned in self.owned.values()]
        return {"owner_residual_norm": float(np.linalg.norm(norms)),
                "owner_imbalance": float(imbalance), "applied_entries": int(entries)}

    def _current_bounds(self, bounds: Any, bucket: Bucket) -> allreduce.Bounds:
        """The bounds as they are kept, or even ones where nothing is kept yet."""
        known = np.asarray(bounds, np.int64)
        return known if known[-1] == bucket.numel else allreduce.even_bounds(bucket.numel,
                                                                             self.collectives.size)

    def _bounds_of(self, bounds: Any, bucket: Bucket, rank: int) -> tuple[int, int]:
        known = self._current_bounds(bounds, bucket)
        return int(known[rank]), int(known[rank + 1])

    @staticmethod
    def _call_numpy(function: Callable[..., Any], given: Sequence[tf.Tensor],
                    results: Sequence[tuple[tf.DType, tuple[int | None, ...]]]) -> list[tf.Tensor]:
        """Run NumPy code in the graph; ``results`` are dtypes and shapes."""
        found = tf.numpy_function(function, list(given), [dtype for dtype, _ in results])
        return [tf.ensure_shape(one, shape) for one, (_, shape) in zip(found, results, strict=True)]

"""What TopK computes on tensors: choose, round, pack, unpack, add up. No collectives, no state.

Passes over a whole bucket are compiled by XLA, which fuses them; what has a length that depends on
the data is not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hvd_ext.consistency.fingerprint import digest_parts
from hvd_ext.reducers.topk import Layout, TopK
from hvd_ext.reducers.topk.plan import Segment
from hvd_ext.reducers.topk.selection import SAMPLE, has_enough_candidates, sample_ranks
from hvd_ext.reducers.topk.wire import HEADER_WORDS

BLOCK_NUMEL = 16  # entries of which only the largest is looked at first; a cache line of float32


class Total(NamedTuple):
    """g + e, added up where it is looked at; ``residual`` is None without error feedback.

    ``gradient`` is 1-D and floating; the sum is of the residual's dtype, else of the gradient's.
    """

    gradient: tf.Tensor
    residual: tf.Tensor | None

    @property
    def dtype(self) -> tf.DType:
        """Of the sums."""
        return (self.gradient if self.residual is None else self.residual).dtype

    def slice_between(self, start: Any, stop: Any) -> Total:
        """A stretch of it."""
        return Total(self.gradient[start:stop],
                     None if self.residual is None else self.residual[start:stop])

    def values_at(self, places: tf.Tensor) -> tf.Tensor:
        """The sums at some places; where it is 2-D, its rows there."""
        gradient = tf.gather(self.gradient, places)
        if self.residual is None:
            return gradient
        return tf.cast(gradient, self.residual.dtype) + tf.gather(self.residual, places)

    def all_values(self) -> tf.Tensor:
        """All sums."""
        if self.residual is None:
            return self.gradient
        return tf.cast(self.gradient, self.residual.dtype) + self.residual

    def in_blocks(self, size: int) -> Total:
        """As (n / size, size); what is left over is not in it."""
        count = int(self.gradient.shape[0]) // size

        def shaped(tensor: tf.Tensor) -> tf.Tensor:
            return tf.reshape(tensor[:count * size], (count, size))

        return Total(shaped(self.gradient),
                     None if self.residual is None else shaped(self.residual))


class Selection(NamedTuple):
    """int32 positions in g + e, the sums there, and whether all of g + e is finite."""

    positions: tf.Tensor
    exact: tf.Tensor
    finite: tf.Tensor


def select_entries(total: Total, segments: Sequence[Segment], config: TopK, seed: tuple[int, ...],
                   step: tf.Tensor) -> Selection:
    """The entries to send (SPARS-AMS Algorithm 1, line 7).

    Args:
        total: n numbers, float32 or float64.
        segments: of each, the ``k`` largest by magnitude are chosen; equals by lowest position;
            zeros never. ``config.selection == "sampled"`` may stay up to ``tolerance * k`` below k.
        config: the method's settings.
        seed: numbers that tell this draw from others; an exact selection does not depend on it.
        step: 0-D, one more such number.

    Returns:
        Positions, rising, what is there, and whether all of ``total`` is finite: where a segment is
        not, nothing of it is chosen.
    """
    chosen = []
    for number, segment in enumerate(segments):
        piece = total.slice_between(segment.offset, segment.offset + segment.numel)
        found = _select_one(piece, segment, config, (*seed, number), step)
        chosen.append(found._replace(positions=found.positions + segment.offset))
    return Selection(tf.concat([one.positions for one in chosen], axis=0),
                     tf.concat([one.exact for one in chosen], axis=0),
                     tf.reduce_all([one.finite for one in chosen]))


def _select_one(piece: Total, segment: Segment, config: TopK, seed: tuple[int, ...],
                step: tf.Tensor) -> Selection:
    def nothing() -> tuple[tf.Tensor, tf.Tensor]:
        return tf.zeros((0,), tf.int32), tf.zeros((0,), piece.dtype)

    def all_of_it() -> tuple[tf.Tensor, tf.Tensor]:
        sums = piece.all_values()
        positions = select_largest(tf.abs(sums), segment.k)
        return positions, tf.gather(sums, positions)

    ranks = sample_ranks(segment.numel, segment.k, config.selection)
    if not ranks:
        fine = tf.reduce_all(tf.math.is_finite(piece.all_values()))
        return Selection(*tf.cond(fine, all_of_it, nothing), fine)
    blocks = piece.in_blocks(BLOCK_NUMEL)
    maxima = block_maxima(*blocks)
    rest = piece.slice_between(segment.numel - segment.numel % BLOCK_NUMEL, segment.numel).all_values()
    fine = tf.logical_and(tf.reduce_all(tf.math.is_finite(maxima)),
                          tf.reduce_all(tf.math.is_finite(rest)))
    # A sampled selection needs fewer than k; the rule is plain Python, so it is turned around.
    least = next(n for n in range(segment.k + 1)
                 if has_enough_candidates(n, segment.k, config.selection, config.tolerance))
    seeds = tf.stack([tf.constant(digest_parts(*seed), tf.int64), tf.cast(step, tf.int64)])

    def search() -> tuple[tf.Tensor, tf.Tensor]:
        # One of each of SAMPLE strides: as good as any of all, and quicker to fetch.
        start = tf.range(SAMPLE, dtype=tf.int64) * segment.numel // SAMPLE
        shift = tf.random.stateless_uniform((SAMPLE,), seeds, 0, segment.numel // SAMPLE, tf.int64)
        sample = tf.math.top_k(tf.abs(piece.values_at(start + shift)), ranks[-1]).values

        def attempt(number: int) -> tuple[tf.Tensor, tf.Tensor]:
            if number == len(ranks):
                return all_of_it()
            threshold = sample[ranks[number] - 1]
            positions, exact = _find_above(blocks, maxima, rest, threshold)
            excess = tf.size(positions) - segment.k
            # A threshold of zero leaves out nothing that may be chosen.
            settled = tf.logical_or(tf.size(positions) >= least, threshold <= 0)
            return tf.cond(
                settled,
                lambda: tf.cond(excess > 0, lambda: _without_smallest(positions, exact, excess),
                                lambda: (positions, exact)),
                lambda: attempt(number + 1))

        return attempt(0)

    return Selection(*tf.cond(fine, search, nothing), fine)


@tf.function(jit_compile=True, autograph=False)
def block_maxima(gradient: tf.Tensor, residual: tf.Tensor | None) -> tf.Tensor:
    """The largest magnitude of g + e in each row; NaN where there is one."""
    # Column by column all of it becomes one loop; a reduction would need the sums in memory first.
    columns = [Total(gradient[:, i], None if residual is None else residual[:, i]).all_values()
               for i in range(gradient.shape[1])]
    # Magnitudes are in the order of their bits read as integers, infinity and then NaN the last.
    bits = tf.int64 if columns[0].dtype == tf.float64 else tf.int32
    largest_bits = functools.reduce(tf.maximum, [tf.bitcast(tf.abs(one), bits) for one in columns])
    return tf.bitcast(largest_bits, columns[0].dtype)


def _find_above(blocks: Total, maxima: tf.Tensor, rest: tf.Tensor,
                threshold: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Rising int32 positions of what lies at the threshold or above (above 0 if it is 0), and what
    is there. ``rest`` are the sums behind the blocks."""
    bound = tf.maximum(threshold, maxima.dtype.as_numpy_dtype(np.finfo(maxima.dtype.name).tiny))
    rows = positions_of(maxima >= bound)
    sums = blocks.values_at(rows)
    found = tf.where(tf.abs(sums) >= bound)
    behind = positions_of(tf.abs(rest) >= bound)
    at_row = tf.gather(rows, found[:, 0]) * BLOCK_NUMEL + tf.cast(found[:, 1], tf.int32)
    start = int(maxima.shape[0]) * BLOCK_NUMEL
    return (tf.concat([at_row, behind + start], axis=0),
            tf.concat([tf.gather_nd(sums, found), tf.gather(rest, behind)], axis=0))


def _without_smallest(positions: tf.Tensor, exact: tf.Tensor,
                      excess: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Both less the ``excess`` smallest magnitudes, equals by highest position."""
    backwards = tf.math.top_k(-tf.abs(tf.reverse(exact, [0])), excess).indices  # equals: lowest first
    dropped = tf.size(positions) - 1 - backwards
    keep = tf.tensor_scatter_nd_update(tf.ones(tf.shape(positions), tf.bool), dropped[:, None],
                                       tf.zeros(tf.shape(dropped), tf.bool))
    return tf.boolean_mask(positions, keep), tf.boolean_mask(exact, keep)


def select_largest(magnitudes: tf.Tensor, k: int) -> tf.Tensor:
    """Rising positions of the ``k`` largest, equals by lowest position, zeros never."""
    found = tf.math.top_k(magnitudes, tf.minimum(k, tf.size(magnitudes)))  # equals: lowest first
    positions = tf.boolean_mask(found.indices, found.values > 0)
    return tf.sort(positions)


def positions_of(mask: tf.Tensor) -> tf.Tensor:
    """Rising int32 positions where the mask is set."""
    return tf.cast(tf.where(mask)[:, 0], tf.int32)


def wire_dtype(config: TopK) -> tf.DType:
    """The dtype of the values on the wire."""
    return tf.as_dtype(config.values)


def split_selected(exact: tf.Tensor, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """What to send of the sums that were chosen, and what rounding takes away, which stays.

    Both add up to ``exact``, bit for bit (SPARS-AMS Algorithm 1, lines 7, 8).

    Returns:
        Values of ``dtype``, never infinite; the new e there.
    """
    limit = min(float(dtype.max), float(exact.dtype.max))
    values = tf.cast(tf.clip_by_value(exact, -limit, limit), dtype)
    return values, exact - tf.cast(values, exact.dtype)


@tf.function(jit_compile=True, autograph=False)
def new_residual(gradient: tf.Tensor, residual: tf.Tensor, positions: tf.Tensor,
                 left: tf.Tensor) -> tf.Tensor:
    """g + e with ``left`` in place of what was sent (SPARS-AMS Algorithm 1, line 8).

    Args:
        gradient, residual: (n,).
        positions: int32; those of n or more are left out.
        left: of the residual's dtype, one for each position.
    """
    return tf.tensor_scatter_nd_update(Total(gradient, residual).all_values(), positions[:, None], left)


def pack_message(positions: tf.Tensor, values: tf.Tensor, layout: Layout) -> tf.Tensor:
    """One message: int32, of ``layout.words`` words."""
    count = tf.size(positions)
    indices = layout.indices.stop - layout.indices.start
    per_word = 4 // values.dtype.size if values.dtype.size < 4 else 1
    words = layout.data.stop - layout.data.start
    room = words * 4 // values.dtype.size
    padded = tf.pad(values, [[0, room - count]])
    shape = (words, per_word) if per_word > 1 else (room,)
    data = tf.reshape(tf.bitcast(tf.reshape(padded, shape), tf.int32), (words,))
    return tf.concat([tf.stack([count, layout.k]),
                      tf.pad(positions, [[0, indices - count]]), data], axis=0)


def unpack_messages(messages: tf.Tensor, layout: Layout, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """Positions (M, k) int32 and values (M, k) of messages (M, words).

    Where a rank sent fewer than k entries the rest is zeros at position 0.
    """
    ranks = tf.shape(messages)[0]
    data = messages[:, layout.data]
    if dtype.size == 8:
        data = tf.reshape(data, (ranks, -1, 2))
    values = tf.reshape(tf.bitcast(data, dtype), (ranks, -1))[:, :layout.k]
    return messages[:, HEADER_WORDS:HEADER_WORDS + layout.k], values


@tf.function(jit_compile=True, autograph=False)
def mean_of(positions: tf.Tensor, values: tf.Tensor, numel: int, dtype: tf.DType) -> tf.Tensor:
    """The mean of what M ranks sent, dense: (numel,) of ``dtype`` (SPARS-AMS Algorithm 1, line 12).

    Rank by rank, the positions of one being unique but for zeros: the result does not depend on
    the order of an addition's parts, and all ranks, on CPU or GPU, get the same bits.

    Args:
        positions, values: (M, k), as :func:`unpack_messages` gives them.
    """
    ranks = int(positions.shape[0])

    def add(rank: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        sent = tf.cast(tf.gather(values, rank), dtype) / ranks
        places = tf.gather(positions, rank)[:, None]
        return rank + 1, tf.tensor_scatter_nd_add(total, places, sent)

    _, total = tf.while_loop(lambda rank, _: rank < ranks, add,
                             (tf.constant(0), tf.zeros((numel,), dtype)))
    return total

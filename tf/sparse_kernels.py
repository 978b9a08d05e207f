"""What TopK computes on tensors: choose, round, pack, unpack, add up. No collectives, no state."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from hvd_ext.buckets import digest
from hvd_ext.sparse import Layout, TopK
from hvd_ext.sparse.plan import Segment
from hvd_ext.sparse.selection import SAMPLE, enough, sample_ranks
from hvd_ext.sparse.wire import HEADER_WORDS


def select(flat: tf.Tensor, segments: Sequence[Segment], config: TopK,
           seed: tuple[int, ...], step: tf.Tensor) -> tf.Tensor:
    """Positions of the entries to send (SPARS-AMS Algorithm 1, line 7).

    Args:
        flat: n finite numbers, float32 or float64.
        segments: of each, the ``k`` largest by magnitude are chosen; equals by lowest position;
            zeros never. ``config.selection == "sampled"`` may stay up to ``tolerance * k`` below k.
        config: the method's settings.
        seed: numbers that tell this draw from others; an exact selection does not depend on it.
        step: 0-D, one more such number.

    Returns:
        int32 positions in ``flat``, rising.
    """
    chosen = []
    for number, segment in enumerate(segments):
        piece = flat[segment.offset:segment.offset + segment.numel]
        positions = _select_one(piece, segment, config, (*seed, number), step)
        chosen.append(positions + segment.offset)
    return tf.concat(chosen, axis=0)


def _select_one(piece: tf.Tensor, segment: Segment, config: TopK, seed: tuple[int, ...],
                step: tf.Tensor) -> tf.Tensor:
    magnitudes = tf.abs(piece)
    ranks = sample_ranks(segment.numel, segment.k, config.selection)
    if not ranks:
        return largest(magnitudes, segment.k)
    seeds = tf.stack([tf.constant(digest(*seed), tf.int64), tf.cast(step, tf.int64)])
    places = tf.random.stateless_uniform((SAMPLE,), seeds, 0, segment.numel, tf.int32)
    sample = tf.math.top_k(tf.gather(magnitudes, places), ranks[-1]).values

    def attempt(number: int) -> tf.Tensor:
        if number == len(ranks):
            return largest(magnitudes, segment.k)
        threshold = sample[ranks[number] - 1]
        above = tf.where(threshold > 0, magnitudes >= threshold, magnitudes > 0)
        found = positions_of(above)
        count = tf.size(found)
        # A sampled selection needs fewer than k; the rule is plain Python, so it is turned around.
        least = next(n for n in range(segment.k + 1)
                     if enough(n, segment.k, config.selection, config.tolerance))
        return tf.cond(
            count >= least,
            lambda: tf.cond(count > segment.k,
                            lambda: tf.gather(found, largest(tf.gather(magnitudes, found),
                                                             segment.k)),
                            lambda: found),
            lambda: attempt(number + 1))

    return attempt(0)


def largest(magnitudes: tf.Tensor, k: int) -> tf.Tensor:
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


def split(flat: tf.Tensor, positions: tf.Tensor, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """The values to send of g + e, and the new e: what stays, with what rounding takes away.

    The values and the new e add up to ``flat``, bit for bit (SPARS-AMS Algorithm 1, lines 7, 8).

    Returns:
        Values of ``dtype`` in the order of ``positions``, never infinite; e of ``flat``'s dtype.
    """
    exact = tf.gather(flat, positions)
    limit = min(float(dtype.max), float(flat.dtype.max))
    values = tf.cast(tf.clip_by_value(exact, -limit, limit), dtype)
    left = exact - tf.cast(values, flat.dtype)
    return values, tf.tensor_scatter_nd_update(flat, positions[:, None], left)


def pack(positions: tf.Tensor, values: tf.Tensor, layout: Layout) -> tf.Tensor:
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


def headers(messages: tf.Tensor) -> tf.Tensor:
    """Each rank's (count, k), (M, 2) int32, of messages (M, words)."""
    return messages[:, :HEADER_WORDS]


def add_up(messages: tf.Tensor, layout: Layout, dtype: tf.DType, ranks: int,
           total: tf.Tensor) -> tf.Tensor:
    """``total`` with every rank's entries added, rank by rank (SPARS-AMS Algorithm 1, line 12).

    A rank's positions are unique, so each addition is one scatter whose result does not depend on
    the order of its parts: all ranks, on CPU or GPU, get the same bits.
    """
    for words in tf.unstack(messages, num=ranks):
        count = words[0]
        positions = words[HEADER_WORDS:HEADER_WORDS + count]
        data = words[layout.data]
        if dtype.size == 8:
            data = tf.reshape(data, (-1, 2))
        values = tf.reshape(tf.bitcast(data, dtype), (-1,))[:count]
        total = tf.tensor_scatter_nd_add(total, positions[:, None], tf.cast(values, total.dtype))
    return total

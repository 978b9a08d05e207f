"""What compressed replies compute on tensors: pack, read, add to the weights. No collectives, no state."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from hvd_ext.reducers.topk import Layout, TopK
from hvd_ext.reducers.topk.plan import Segment
from hvd_ext.sharding.downlink import FAILED
from hvd_ext.tensorflow.reducers.kernels import topk

WORDS = {2: tf.int16, 4: tf.int32, 8: tf.int64}


def pack_entries(difference: tf.Tensor, segments: Sequence[Segment], layout: Layout, config: TopK,
                 seed: tuple[int, ...], step: tf.Tensor, failed: bool) -> tf.Tensor:
    """The largest entries of ``difference`` as one message, (layout.words,) int32.

    Args:
        difference: w - w^ of a bucket, 1-D, float32 or float64; where it is not finite the message says that
            the update failed.
        segments: what is chosen from.
        seed, step: of a sampled selection; ``step`` is 0-D.
        failed: the owner's update failed.
    """
    chosen = topk.select_entries(topk.Total(difference, None), segments, config, seed, step)
    values, _ = topk.split_selected(chosen.exact, topk.wire_dtype(config))
    words = topk.pack_message(chosen.positions, values, layout)
    good = tf.logical_and(chosen.finite, not failed)
    silent = tf.concat([[FAILED, layout.k], tf.zeros((layout.words - 2,), tf.int32)], axis=0)
    return tf.ensure_shape(tf.where(good, words, silent), (layout.words,))


def add_entries(flat: tf.Tensor, words: tf.Tensor, layout: Layout, dtype: tf.DType) -> tf.Tensor:
    """w^ of a bucket, 1-D, with a message's entries added; a message of a failed update adds nothing."""
    positions, values = topk.unpack_messages(words[None], layout, dtype)
    wide = wide_dtype(flat.dtype)
    # Places that were not filled are zeros at position 0.
    added = tf.tensor_scatter_nd_add(tf.cast(flat, wide), positions[0][:, None], tf.cast(values[0], wide))
    return tf.cast(added, flat.dtype)


def pack_half(difference: tf.Tensor, failed: bool) -> tf.Tensor:
    """``difference`` in float16, (numel + 1,); the last is 1 where the update failed or it is not finite."""
    limit = float(tf.float16.max)
    good = tf.logical_and(tf.reduce_all(tf.math.is_finite(difference)), not failed)
    values = tf.where(good, tf.clip_by_value(difference, -limit, limit), tf.zeros_like(difference))
    status = tf.where(good, 0.0, 1.0)
    return tf.concat([tf.cast(values, tf.float16), tf.cast(status, tf.float16)[None]], axis=0)


def add_half(flat: tf.Tensor, message: tf.Tensor) -> tf.Tensor:
    """w^ of a bucket, 1-D, with a float16 reply added."""
    wide = wide_dtype(flat.dtype)
    return tf.cast(tf.cast(flat, wide) + tf.cast(message[:-1], wide), flat.dtype)


def weight_difference(exact: tf.Tensor, held: tf.Tensor) -> tf.Tensor:
    """w - w^, 1-D, in at least float32."""
    wide = wide_dtype(held.dtype)
    return tf.reshape(tf.cast(exact, wide) - tf.cast(held, wide), [-1])


def wide_dtype(dtype: tf.DType) -> tf.DType:
    """What weights are subtracted and added up in: at least float32."""
    return dtype if dtype.size >= 4 else tf.float32


def bit_sum(value: tf.Tensor) -> tf.Tensor:
    """A sum of the bits of a tensor, 8 bytes at a time, 0-D int64: where it is another one, bits are."""
    flat, size = tf.reshape(value, [-1]), value.dtype.size
    numel, together = int(value.shape.num_elements()), 8 // size
    paired = numel - numel % together
    rest = tf.reduce_sum(tf.cast(tf.bitcast(flat[paired:], WORDS[size]), tf.int64))
    if not paired:
        return rest
    pairs = flat if paired == numel else flat[:paired]
    shaped = pairs if together == 1 else tf.reshape(pairs, (-1, together))
    return tf.reduce_sum(tf.bitcast(shaped, tf.int64)) + rest

"""The delay-compensated sum of several workers' gradients, elementwise, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvd_ext.delay import DelayCompensated


def compensated_sum(rows: Sequence[tf.Tensor], config: DelayCompensated, step: Any,
                    mean_square: tf.Tensor | None,
                    scale: float = 1.0) -> tuple[tf.Tensor, tf.Tensor | None]:
    """``sum_j c^j / scale``, taking up the rows in their order, and the new MeanSquare.

    With ``g^j = scale * rows[j]`` the terms are ``c^j = g^j + lam g^j*g^j*(w~_j - w_t)`` (DC-ASGD
    supplement eq. 95). Since ``w~_j - w_t = -step * sum_{i<j} c^i``, the running sum S itself is
    the displacement and ``S <- S + g - step*lam*g*g*S`` is the whole recursion.

    Args:
        rows: the workers' gradients of a slice, 1-D, of equal length and floating dtype.
        config: lam and its rule, and the reading of the displacement.
        step: ``lr / M``, the step of one worker; a number or 0-D tensor.
        mean_square: MeanSquare of the slice before; None with a constant lam.
        scale: the workers' gradients are ``scale`` times the rows.

    Returns:
        The sum, float32 (float64 for float64 rows), and MeanSquare after the last row.
    """
    wide = accumulation_dtype(rows[0].dtype)
    strength = tf.cast(step, wide) * config.lam * scale**2
    total = tf.zeros(tf.shape(rows[0]), wide)
    cumulative = config.displacement == "cumulative"
    for number, row in enumerate(rows):
        gradient = tf.cast(row, wide)
        if mean_square is not None:
            mean_square = (config.decay * mean_square
                           + (1 - config.decay) * scale**2 * gradient * gradient)
        if number == 0 and cumulative:
            total = gradient  # nothing was applied before the first
            continue
        correction = gradient * (total if cumulative else gradient)
        if mean_square is not None:
            correction *= tf.math.rsqrt(mean_square + config.eps)
        total = total + gradient - strength * gradient * correction
    return total, mean_square


@tf.function(jit_compile=True, autograph=False)
def reduced_slice(rows: tf.Tensor, order: tf.Tensor, good: tf.Tensor, step: tf.Tensor,
                  mean_square: tf.Tensor | None, config: DelayCompensated, scale: float,
                  divisor: int) -> tuple[tf.Tensor, tf.Tensor | None]:
    """The compensated sum of a slice over ``divisor``, and MeanSquare after it, in one pass over memory.

    Compiled by XLA, which makes one loop of what would be a dozen operations with a result each.

    Args:
        rows: (workers, own), the workers' gradients of the slice.
        order: (workers,) int32, in which they are taken up.
        good: 0-D bool; if not, the result is the plain sum, and MeanSquare stays.
        step, mean_square, config, scale: see :func:`compensated_sum`.
        divisor: what the sum is divided by.
    """
    taken = [rows[order[number]] for number in range(rows.shape[0])]
    total, after = compensated_sum(taken, config, step, mean_square, scale)
    total = tf.where(good, total, plain_sum(taken)) / divisor
    return total, None if after is None else tf.where(good, after, mean_square)


def plain_sum(rows: Sequence[tf.Tensor]) -> tf.Tensor:
    """The rows' plain sum in their order, accumulated as in :func:`compensated_sum`."""
    total = tf.cast(rows[0], accumulation_dtype(rows[0].dtype))
    for row in rows[1:]:
        total = total + tf.cast(row, total.dtype)
    return total


def accumulation_dtype(dtype: tf.DType) -> tf.DType:
    """float64 for float64, else float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def square_norm(flat: tf.Tensor) -> tf.Tensor:
    """The squared 2-norm along the last axis; half precision is summed in float32."""
    wide = tf.cast(flat, accumulation_dtype(flat.dtype))
    return tf.reduce_sum(wide * wide, axis=-1)

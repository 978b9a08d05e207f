"""The compensation of a gradient that is applied one step late, elementwise."""

from __future__ import annotations

import tensorflow as tf

from hvd_ext.reducers.delay_compensation import DelayedUpdate
from hvd_ext.tensorflow.reducers.kernels.delay_compensation import accumulation_dtype


def compensate_gradient(gradient: tf.Tensor, now: tf.Tensor, before: tf.Tensor, mean_square: tf.Tensor | None,
                        rule: DelayedUpdate) -> tuple[tf.Tensor, tf.Tensor | None]:
    """The gradient g taken at weights ``before`` as one for the weights ``now``, and the new MeanSquare.

    ``g + lam g*g*(now - before)``, with ``lam / sqrt(MeanSquare + eps)`` for an adaptive rule.

    Args:
        gradient: g; any shape and floating dtype. Half precision is computed in float32.
        now, before: weights of the gradient's shape and dtype.
        mean_square: MeanSquare of g so far; float32 (float64 for float64). None for a constant lam.
        rule: the strength.
    """
    wide = tf.cast(gradient, accumulation_dtype(gradient.dtype))
    correction = (tf.cast(now, wide.dtype) - tf.cast(before, wide.dtype)) * wide * wide
    if mean_square is not None:
        mean_square = mean_square * rule.decay + (1 - rule.decay) * wide * wide
        correction *= tf.math.rsqrt(mean_square + rule.eps)
    return tf.cast(wide + rule.lam * correction, gradient.dtype), mean_square

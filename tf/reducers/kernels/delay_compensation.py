"""The delay-compensated sum of several workers' gradients, elementwise, on any device."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from hvd_ext.reducers.delay_compensation import DelayCompensated

MAX_FUSED = 16  # workers that one pass over memory applies


class Rule(NamedTuple):
    """What is compiled in of the settings, as plain values: a trace is found again by what they are."""

    lam: float
    decay: float
    eps: float
    cumulative: bool


def reduced_slice(rows: tf.Tensor, order: tf.Tensor, good: tf.Tensor, step: tf.Tensor,
                  mean_square: tf.Tensor | None, config: DelayCompensated, scale: float,
                  divisor: int) -> tuple[tf.Tensor, tf.Tensor | None]:
    """``sum_j c^j / scale / divisor`` over the workers, and MeanSquare after the last.

    With ``g^j = scale * rows[j]`` the terms are ``c^j = g^j + lam g^j*g^j*(w~_j - w_t)`` (DC-ASGD
    supplement eq. 95). Since ``w~_j - w_t = -step * sum_{i<j} c^i``, the running sum S itself is
    the displacement and ``S <- S + g - step*lam*g*g*S`` is the whole recursion. XLA makes one loop
    over memory of what would be a dozen operations with a result each.

    Args:
        rows: (workers, own), the workers' gradients of a slice, of floating dtype.
        order: (workers,) int32, in which they are applied.
        good: 0-D bool; if not, the result is of the plain sum, and MeanSquare stays.
        step: ``lr / M``, the step of one worker, 0-D.
        mean_square: MeanSquare of the slice before; None with a constant lam.
        config: lam and its rule, and the reading of the displacement.
        scale: the workers' gradients are ``scale`` times the rows.
        divisor: what the sum is divided by.

    Returns:
        Both (own,), float32, float64 for float64 rows.
    """
    rule = Rule(config.lam, config.decay, config.eps, config.displacement == "cumulative")
    return _reduced_slice(rows, order, good, step, mean_square, rule, scale, divisor)


@tf.function(jit_compile=True, autograph=False)
def _reduced_slice(rows: tf.Tensor, order: tf.Tensor, good: tf.Tensor, step: tf.Tensor,
                   mean_square: tf.Tensor | None, rule: Rule, scale: float,
                   divisor: int) -> tuple[tf.Tensor, tf.Tensor | None]:
    wide = accumulation_dtype(rows.dtype)
    strength = tf.cast(step, wide) * rule.lam * scale**2

    def add(number: Any, total: tf.Tensor | None, square: tf.Tensor | None
            ) -> tuple[tf.Tensor, tf.Tensor | None]:
        # Not rows[order[number]]: XLA would compile anew for each order.
        gradient = tf.cast(tf.gather(rows, tf.gather(order, number)), wide)
        if square is not None:
            square = rule.decay * square + (1 - rule.decay) * scale**2 * gradient * gradient
        if total is None:
            total = tf.zeros_like(gradient)
            if rule.cumulative:  # nothing was applied before the first
                return gradient, square
        correction = gradient * (total if rule.cumulative else gradient)
        if square is not None:
            correction *= tf.math.rsqrt(square + rule.eps)
        correction *= strength * gradient
        return total + gradient - tf.where(good, correction, tf.zeros_like(correction)), square

    def together(start: Any, count: int, *state: tf.Tensor | None) -> tuple[tf.Tensor | None, ...]:
        for number in range(count):
            state = add(start + number, *state)
        return state

    workers = int(rows.shape[0])
    first = workers % MAX_FUSED or MAX_FUSED
    state = together(0, min(first, workers), None, mean_square)
    if workers > first:
        kept = [part for part in state if part is not None]
        _, *state = tf.while_loop(
            lambda start, *_: start < workers,
            lambda start, total, square=None: tuple(
                part for part in (start + MAX_FUSED, *together(start, MAX_FUSED, total, square))
                if part is not None),
            (tf.constant(first), *kept))
    total, after = (*state, None)[:2]
    return total / divisor, None if after is None else tf.where(good, after, mean_square)


def accumulation_dtype(dtype: tf.DType) -> tf.DType:
    """float64 for float64, else float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def square_norms(flat: tf.Tensor) -> tf.Tensor:
    """The squared 2-norm of each row, float64; half precision is summed in float32."""
    wide = tf.cast(flat, accumulation_dtype(flat.dtype))
    return tf.cast(tf.math.reduce_euclidean_norm(wide, axis=-1), tf.float64) ** 2

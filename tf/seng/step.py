"""The step: from reduced gradients to SENG's directions. Equations 26 to 28 and the three couplings.

p = (g - U b)/lam          (SENG eq. 8)   ``LayerSystem.subtract``
b = (lam I + U^T U)^-1 U^T g    (eq. 9)   ``LayerSystem.message``
U b = (1/M) sum_i U_i b_i      (eq. 26)   each rank its own ``b_i``, small layers in one allreduce
the two means of eq. 28 in place of it, for ``uc="factored"``   ``Product.message``
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import tensorflow as tf

from hvd_ext.seng import Settings
from hvd_ext.tensorflow.seng.blocks import Context
from hvd_ext.tensorflow.seng.layer_curvature import LayerCurvature
from hvd_ext.tensorflow.seng.shared_functions import outside_trace

MIN_SEPARATE_NUMEL = 1 << 18  # numbers from which on a message is worth no copy

Gradients = dict[LayerCurvature, list[tf.Tensor]]
"""Of each layer whose weights all have a gradient: flat, one per weight, in the layer's precision."""


def compute_directions(gradients: Gradients, at: tf.Tensor, lam: tf.Tensor, good: tf.Tensor, due: tf.Tensor,
                       wanted: tf.Variable, refresh: Callable[[], tf.Tensor],
                       otherwise: Callable[[], tf.Tensor],
                       context: Context
                       ) -> tuple[dict[LayerCurvature, list[tf.Tensor]], tf.Tensor]:
    """The layers' directions, and whether a refresh gave new curvature; in a graph being traced.

    Args:
        at: the step, 0-D int64. lam: the damping, 0-D float64.
        good: whether all gradients are finite; where they are not they come back as they are.
        due: whether this step refreshes the curvature, known from ``good`` on; ``wanted`` is known
            before any gradient is.
        refresh: takes new curvature. otherwise: what a step without new curvature begins with; False.
    """
    def no_refresh() -> tf.Tensor:
        return tf.constant(False)

    if context.settings.coupling == "lagged":  # U b of the gradient of the step before (SENG eq. 27)
        # Waits for no gradient, so that it is under way during the backward pass.
        begun = tf.cond(wanted, no_refresh, otherwise)
        with tf.control_dependencies([begun]):
            early = tf.cond(
                wanted, lambda: [block.zero_message(context) for one in gradients for block in one.blocks],
                lambda: mean_over_ranks([(one, one.kept_gradients()) for one in gradients], context))
        with tf.control_dependencies(early):
            made = outside_trace(lambda: tf.cond(due, refresh, no_refresh))
        with tf.control_dependencies([made]):
            means = tf.cond(
                due, lambda: mean_over_ranks(
                    [(one, one.kept_or(mine)) for one, mine in gradients.items()], context),
                lambda: early)
        tf.cond(good, lambda: run_all(one.keep_gradients(mine) for one, mine in gradients.items()),
                no_refresh)
    else:  # "block", U = diag(U_i) (SENG eq. 26), and "full", one system of all ranks' samples
        made = tf.cond(due, refresh, otherwise)
        with tf.control_dependencies([made]):
            means = mean_over_ranks(list(gradients.items()), context)
    means = [tf.where(good, mean, tf.zeros_like(mean)) for mean in means]
    without, with_curvature = direction_factors(good, lam, context.settings)
    result = {}
    with tf.control_dependencies([made]):
        ready = {one: one.ready.read_value() for one in gradients}
    for one, mine in gradients.items():
        own, means = means[:len(one.blocks)], means[len(one.blocks):]
        factor = tf.where(ready[one], with_curvature, without)
        result[one] = one.apply_direction(own, mine, tf.cast(factor, one.layer.dtype), context)
        if context.settings.stale_curvature == "rescale":
            with tf.control_dependencies([made]):
                stale = good & ready[one] & tf.not_equal(one.taken_at.read_value(), at)
            result[one] = rescale_stale(result[one], mine, stale)
    return result, made


def rescale_stale(direction: Sequence[tf.Tensor], gradient: Sequence[tf.Tensor], stale: tf.Tensor
                  ) -> list[tf.Tensor]:
    """``p / (1 + g^T p)`` where ``stale``: ``(U U^T + g g^T + lam I)^{-1} g``, by Sherman and Morrison."""
    product = tf.add_n([tf.reduce_sum(p * g) for p, g in zip(direction, gradient, strict=True)])
    divisor = tf.where(stale, 1.0 + tf.maximum(product, 0.0), tf.ones_like(product))
    return [p / divisor for p in direction]


def mean_over_ranks(wanted: Sequence[tuple[LayerCurvature, Sequence[tf.Tensor]]],
                    context: Context) -> list[tf.Tensor]:
    """The mean of the ranks' contributions to ``U b`` (SENG eq. 26, 28) for layers' gradients.

    Returns:
        Flat tensors, one per block of each layer, in order.
    """
    messages: list[tf.Tensor] = []
    names: list[str] = []
    small: dict[tf.DType, list[int]] = {}
    for system, gradients in wanted:
        for block, message in zip(system.blocks, system.local_contribution(gradients, context), strict=True):
            if block.max_message_numel(context) < MIN_SEPARATE_NUMEL:
                small.setdefault(message.dtype, []).append(len(messages))
            messages.append(message)
            names.append(f"{context.prefix}.uc/{system.layer.key}")

    def communicate() -> list[tf.Tensor]:
        means = list(messages)
        together = {k for group in small.values() for k in group}
        for k, message in enumerate(messages):
            if k not in together:
                means[k] = context.collectives.allreduce(message, names[k])
        for group in small.values():
            sent = tf.concat([messages[k] for k in group], axis=0)
            mean = context.collectives.allreduce(sent, f"{context.prefix}.uc")
            sizes = tf.stack([tf.size(messages[k]) for k in group])
            for k, part in zip(group, tf.split(mean, sizes, num=len(group)), strict=True):
                means[k] = tf.ensure_shape(part, messages[k].shape)
        return means

    return list(context.collectives.if_distributed(communicate, lambda: list(messages)))


def direction_factors(good: tf.Tensor, lam: tf.Tensor, settings: Settings) -> tuple[tf.Tensor, tf.Tensor]:
    """What gradients without and with curvature are multiplied with: what ``other`` says, and 1/lam.

    Both are 1 where the gradients are not finite and are to stay as they are. 0-D float64.
    """
    one = tf.ones((), tf.float64)
    other = tf.cast(settings.fallback_divisor(lam), tf.float64)
    return tf.where(good, 1.0 / other, one), tf.where(good, 1.0 / lam, one)


def run_all(done: Iterable[None]) -> tf.Tensor:
    """Run through a generator within a branch of a graph."""
    for _ in done:
        pass
    return tf.constant(True)

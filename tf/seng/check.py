"""Whether what is captured of a layer is its gradient: the sum over samples against the layer's own.

A weight that is used past the layer's ``call``, or by a layer that computes other than its rule knows,
has a gradient that the captured samples do not sum to. The check is made once, with the gradients of this
rank before they are reduced.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hvd_ext.seng import Settings
from hvd_ext.seng.sample_axes import CONSTANT
from hvd_ext.tensorflow.seng.layer_curvature import LayerCurvature
from hvd_ext.tensorflow.seng.layer_discovery import Layer
from hvd_ext.tensorflow.seng.shared_functions import read_handle, write_handle

TOLERANCE, TOLERANCE_HALF = 1e-3, 5e-2  # relative, by the precision that the layer computes in
REASON = ("a weight is used outside of the layer's call, or the layer does not compute what its rule "
          "knows")
NOT_BY_SAMPLE = "its input is the same for all samples, which share its output"


def reason_of(layer: Layer) -> str:
    """Why a layer that is refused has no curvature."""
    return NOT_BY_SAMPLE if layer.samples == CONSTANT else REASON



def check_sums(systems: dict[LayerCurvature, list[Any]], number: tf.Variable, scale: Any,
               settings: Settings) -> None:
    """Set ``wrong`` of each system whose captured samples do not sum to this rank's gradients.

    Args:
        systems: with the gradients and variables of each, pairs in the order of its weights.
        number: the pass that was captured.
        scale: what the gradients are multiplied with beyond the loss, a number or variable.
    """
    for system, pairs in systems.items():
        layer = system.layer
        if layer.samples == CONSTANT:
            continue
        flat = [tf.reshape(tf.cast(tf.convert_to_tensor(gradient), layer.dtype), [-1])
                for gradient, _ in pairs]
        if not isinstance(scale, float) or scale != 1.0:
            flat = [one / tf.cast(scale, layer.dtype) for one in flat]
        penalised = any(_regularizer_of(variable) is not None for _, variable in pairs)
        if penalised:
            flat += [_penalty_gradient(variable, layer) for _, variable in pairs]
        tolerance = TOLERANCE_HALF if "16" in layer.layer.compute_dtype else TOLERANCE

        def compare(wrong: tf.Tensor, number: tf.Tensor, at: tf.Tensor, samples: tf.Tensor, u: tf.Tensor,
                    g: tf.Tensor, a: tf.Tensor, *flat: tf.Tensor, system: LayerCurvature = system,
                    tolerance: float = tolerance) -> tf.Tensor:
            u, g, a = system.captured.read_handles(u, g, a)
            own = len(system.layer.weights)
            expected = tf.concat(flat[:own], axis=0)
            rest = captured_sum(system.layer, u, g, a, settings) - expected
            error = tf.norm(rest)
            if len(flat) > own:  # the loss has the regularizers' penalty in it, or has not
                error = tf.minimum(error, tf.norm(rest + tf.concat(flat[own:], axis=0)))
            # A gradient that is not finite says nothing.
            off = tf.logical_and(error > tolerance * tf.norm(expected), tf.math.is_finite(error))
            if settings.subsample is not None:  # what was left out is in the gradient too
                off = tf.logical_and(off, read_handle(samples, tf.int32) < settings.subsample)
            write_handle(wrong, tf.logical_and(tf.equal(read_handle(at, tf.int64),
                                                        read_handle(number, tf.int64)), off))
            return tf.constant(True)

        key = ("check", system.kind, layer.together, layer.registered.ones, len(layer.weights), tolerance)
        system.traces.call_shared(
            compare, key, [system.wrong, number, system.captured.at, system.captured.samples,
                           *system.captured.held, *flat],
            shapes=[None] * 7 + [[None]] * len(flat))


def captured_sum(layer: Layer, u: tf.Tensor, g: tf.Tensor, a: tf.Tensor, settings: Settings) -> tf.Tensor:
    """The sum over samples of what was captured, as the gradients of a layer's weights: flat, (n,).

    Args:
        u, g, a: as in ``Captured``.
    """
    if layer.registered.rows:
        rho = tf.shape(g)[0]
        assert layer.groups is not None
        flat = tf.reshape(g, (-1, layer.groups[1]))
        height = sum(layer.sizes) // layer.groups[1]
        parts = [tf.reshape(tf.math.unsorted_segment_sum(flat, tf.reshape(a, [-1]), height), [-1])]
    elif layer.together:
        rho = tf.shape(g)[0]
        kernel = tf.einsum("ngka,ngko->ago", a, g)
        parts = [tf.reshape(kernel, [-1])]
        if layer.together > 1:
            parts.append(tf.reshape(tf.reduce_sum(g, axis=(0, 2)), [-1]))
        if layer.together < len(layer.weights):
            parts.append(tf.reduce_sum(u, axis=0))
    else:
        rho = tf.shape(u)[0]
        parts = [tf.reduce_sum(u, axis=0)]
    root = tf.sqrt(tf.cast(tf.maximum(rho, 1), layer.dtype))  # u_i = rho g_i/sqrt(rho), or g_i/sqrt(rho)
    factor = 1.0 / root if settings.loss_reduction == "mean" else root
    return tf.concat(parts, axis=0) * (factor * settings.loss_scale)


def _regularizer_of(variable: Any) -> Any:
    return getattr(variable, "regularizer", None)


def _penalty_gradient(variable: Any, layer: Layer) -> tf.Tensor:
    """What the variable's own regularizer adds to its gradient, flat."""
    value = tf.convert_to_tensor(variable)
    if _regularizer_of(variable) is None:
        return tf.zeros_like(tf.reshape(tf.cast(value, layer.dtype), [-1]))
    with tf.GradientTape() as tape:
        tape.watch(value)
        penalty = _regularizer_of(variable)(value)
    return tf.reshape(tf.cast(tape.gradient(penalty, value), layer.dtype), [-1])

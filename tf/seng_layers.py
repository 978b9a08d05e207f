"""What SENG knows of each kind of Keras layer: its weights, and its per-sample gradients.

A rule takes a layer, its input x and the gradient gz of the loss by its output before the
activation, both with the samples along the first axis, and returns the gradients of each sample:
``(samples, *weight.shape)`` for the kernel (scale) and the bias (offset), None for a weight the
layer does not have. Scaling is not a rule's business: return what ``gz`` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvd_ext.tensorflow.variables import as_tf

_L = keras.layers
TRANSPOSED = (_L.Conv1DTranspose, _L.Conv2DTranspose, _L.Conv3DTranspose)
DEPTHWISE = (_L.DepthwiseConv1D, _L.DepthwiseConv2D)

PerSample = tuple[tf.Tensor | None, tf.Tensor | None]
Rule = Callable[[Any, tf.Tensor, tf.Tensor], PerSample]


@dataclass(frozen=True)
class Registered:
    """A rule, the names of the layer's two weights, and whether an activation follows inside."""

    kind: str
    rule: Rule
    weights: tuple[str, str] = ("kernel", "bias")
    product: bool = False  # whether ``layer_factors`` knows the layer
    activation: bool = True


def rule_for(layer: Any) -> Registered | None:
    """The rule of the layer's class, or of the class its ``call`` comes from."""
    for base in type(layer).__mro__:
        if base in RULES:
            return RULES[base] if type(layer).call is base.call else None
    return None


def _linear(layer: Any, x: tf.Tensor, gz: tf.Tensor) -> PerSample:
    """``G_i A_i^T`` of each sample, group by group (SENG eq. 3)."""
    g, a = layer_factors(layer, x, gz)
    kernel = tf.einsum("igok,igak->iago", g, a)
    bias = tf.reshape(tf.reduce_sum(g, axis=-1), (tf.shape(g)[0], -1)) if layer.use_bias else None
    return tf.reshape(kernel, (-1, *layer.kernel.shape)), bias


def layer_factors(layer: Any, x: tf.Tensor, gz: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """G (samples, groups, n_G, kappa) and A (samples, groups, n_A, kappa) of a linear layer.

    The kernel, viewed as ``(n_A, groups, n_G)``, has the gradient ``sum_i A_i G_i^T``.
    """
    samples = tf.shape(x)[0]
    if isinstance(layer, _L.Dense):
        a = tf.reshape(x, (samples, -1, 1, x.shape[-1]))
        g = tf.reshape(gz, (samples, -1, 1, gz.shape[-1]))
    else:
        if layer.data_format == "channels_first":
            x, gz = (_channels_last(tensor, 1) for tensor in (x, gz))
        taken = patches(x, tuple(layer.kernel_size), tuple(layer.strides),
                        tuple(layer.dilation_rate), layer.padding)
        channels = x.shape[-1]
        groups = channels if isinstance(layer, DEPTHWISE) else layer.groups
        taken = tf.reshape(taken, (samples, taken.shape[1], -1, groups, channels // groups))
        a = tf.transpose(taken, (0, 1, 3, 2, 4))
        a = tf.reshape(a, (samples, a.shape[1], groups, -1))
        g = tf.reshape(gz, (samples, a.shape[1], groups, gz.shape[-1] // groups))
    return tf.transpose(g, (0, 2, 3, 1)), tf.transpose(a, (0, 2, 3, 1))


def kernel_matrix(layer: Any) -> tuple[int, int, int]:
    """(groups, n_G, n_A) of a linear layer's kernel."""
    shape = [int(extent) for extent in layer.kernel.shape]
    if isinstance(layer, _L.Dense):
        return 1, shape[1], shape[0]
    if isinstance(layer, DEPTHWISE):
        return shape[-2], shape[-1], int(np.prod(shape[:-2]))
    return layer.groups, shape[-1] // layer.groups, int(np.prod(shape[:-1]))


def patches(x: tf.Tensor, kernel: tuple[int, ...], strides: tuple[int, ...],
            dilation: tuple[int, ...], padding: str) -> tf.Tensor:
    """Sliding blocks of ``x`` (samples, *space, C): (samples, prod positions, prod kernel, C).

    Raises:
        ValueError: an extent of the space is not known.
    """
    space = x.shape[1:-1]
    if any(extent is None for extent in space):
        raise ValueError("SENG needs the extent of what a convolution sees; give the model's "
                         f"Input a full shape in place of {tuple(x.shape[1:])}")
    before_after = []
    positions = []
    for extent, k, s, d in zip(space, kernel, strides, dilation, strict=True):
        reach = d * (k - 1) + 1
        missing = {"valid": 0, "causal": reach - 1,
                   "same": max((-(-extent // s) - 1) * s + reach - extent, 0)}[padding]
        before = missing if padding == "causal" else missing // 2
        before_after.append([before, missing - before])
        positions.append((extent + missing - reach) // s + 1)
    x = tf.pad(x, [[0, 0], *before_after, [0, 0]])
    for number, (count, k, s, d) in enumerate(zip(positions, kernel, strides, dilation,
                                                  strict=True)):
        places = np.arange(count)[:, None] * s + np.arange(k)[None, :] * d
        x = tf.gather(x, places, axis=1 + 2 * number)
    rank = len(kernel)
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
    return tf.reshape(tf.transpose(x, order), (-1, int(np.prod(positions)), int(np.prod(kernel)),
                                               x.shape[-1]))


def _transposed(layer: Any, x: tf.Tensor, gz: tf.Tensor) -> PerSample:
    """One sample after another by the layer's own backward pass."""
    kernel = tf.cast(tf.stop_gradient(as_tf(layer.kernel)), x.dtype)

    def one(pair: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        sample, gradient = pair
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            z = keras.ops.conv_transpose(
                sample[None], kernel, strides=list(layer.strides), padding=layer.padding,
                output_padding=layer.output_padding, data_format=layer.data_format,
                dilation_rate=layer.dilation_rate)
        return tape.gradient(z, kernel, gradient[None])

    spec = tf.TensorSpec(tuple(layer.kernel.shape), x.dtype)
    kernels = tf.map_fn(one, (x, gz), fn_output_signature=spec)
    if not layer.use_bias:
        return kernels, None
    last = layer.data_format == "channels_last"
    axes = list(range(1, len(gz.shape) - 1)) if last else list(range(2, len(gz.shape)))
    return kernels, tf.reduce_sum(gz, axis=axes)


def _scale_and_offset(layer: Any, normal: tf.Tensor, gz: tf.Tensor, axes: list[int]) -> PerSample:
    """``[sum x_hat gz, sum gz]`` a channel, x_hat taken as given."""
    gamma = tf.reduce_sum(normal * gz, axis=axes) if layer.scale else None
    return gamma, tf.reduce_sum(gz, axis=axes) if layer.center else None


def _batch_norm(layer: Any, x: tf.Tensor, gz: tf.Tensor) -> PerSample:
    channel = layer.axis % len(x.shape)
    axes = [axis for axis in range(len(x.shape)) if axis != channel]
    mean, variance = tf.nn.moments(x, axes, keepdims=True)
    normal = (x - mean) * tf.math.rsqrt(variance + layer.epsilon)
    return _scale_and_offset(layer, normal, gz, axes[1:])


def _layer_norm(layer: Any, x: tf.Tensor, gz: tf.Tensor) -> PerSample:
    given = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    axes = [axis % len(x.shape) for axis in given]
    mean, variance = tf.nn.moments(x, axes, keepdims=True)
    normal = (x - mean) * tf.math.rsqrt(variance + layer.epsilon)
    rest = [axis for axis in range(1, len(x.shape)) if axis not in axes]
    return _scale_and_offset(layer, normal, gz, rest)


def _group_norm(layer: Any, x: tf.Tensor, gz: tf.Tensor) -> PerSample:
    channel = layer.axis % len(x.shape)
    size = x.shape[channel]
    groups = size if layer.groups == -1 else layer.groups
    moved = _channels_last(x, channel)
    flat = tf.reshape(moved, (tf.shape(moved)[0], -1, groups, size // groups))
    mean, variance = tf.nn.moments(flat, [1, 3], keepdims=True)
    normal = tf.reshape((flat - mean) * tf.math.rsqrt(variance + layer.epsilon), tf.shape(moved))
    return _scale_and_offset(layer, normal, _channels_last(gz, channel),
                             list(range(1, len(x.shape) - 1)))


def _channels_last(tensor: tf.Tensor, channel: int) -> tf.Tensor:
    order = [axis for axis in range(len(tensor.shape)) if axis != channel] + [channel]
    return tf.transpose(tensor, order)


_NORM = {"weights": ("gamma", "beta"), "activation": False}

RULES: dict[type, Registered] = {
    _L.Dense: Registered("dense", _linear, product=True),
    _L.BatchNormalization: Registered("batch norm", _batch_norm, **_NORM),
    _L.LayerNormalization: Registered("layer norm", _layer_norm, **_NORM),
    _L.GroupNormalization: Registered("group norm", _group_norm, **_NORM),
    **{kind: Registered("transposed convolution", _transposed) for kind in TRANSPOSED},
    **{kind: Registered("depthwise convolution", _linear, product=True) for kind in DEPTHWISE},
    **{kind: Registered("convolution", _linear, product=True)
       for kind in (_L.Conv1D, _L.Conv2D, _L.Conv3D)},
}

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
import tensorflow as tf

from hvd_ext.tensorflow.variables import as_tf

PerSample = tuple[tf.Tensor | None, tf.Tensor | None]
Rule = Callable[[Any, tf.Tensor, tf.Tensor], PerSample]


@dataclass(frozen=True)
class Registered:
    """A rule, the names of the layer's two weights, and whether an activation follows inside."""

    kind: str
    rule: Rule
    weights: tuple[str, str] = ("kernel", "bias")
    activation: bool = True


def rule_for(layer: Any) -> Registered | None:
    """The rule of the layer's class, or of the class its ``call`` comes from."""
    for base in type(layer).__mro__:
        if base in RULES:
            return RULES[base] if type(layer).call is base.call else None
    return None


def _dense(layer: Any, x: tf.Tensor, gz: tf.Tensor) -> PerSample:
    samples = tf.shape(x)[0]
    a = tf.reshape(x, (samples, -1, x.shape[-1]))
    g = tf.reshape(gz, (samples, -1, gz.shape[-1]))
    kernel = tf.matmul(a, g, transpose_a=True)  # sum over kappa of A_i G_i^T
    return kernel, tf.reduce_sum(g, axis=1) if layer.use_bias else None


def _convolution(layer: Any, x: tf.Tensor, gz: tf.Tensor) -> PerSample:
    """One sample after another by the layer's own backward pass: any rank, stride, padding, group.

    The kernel's gradient of a sample is ``G_i A_i^T`` with A_i the patches, group by group.
    """
    weight = layer.kernel
    kernel = tf.cast(tf.stop_gradient(as_tf(weight)), x.dtype)

    def one(pair: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        sample, gradient = pair
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            z = _linear(layer, sample[None], kernel)
        return tape.gradient(z, kernel, gradient[None])

    spec = tf.TensorSpec(tuple(weight.shape), x.dtype)
    kernels = tf.map_fn(one, (x, gz), fn_output_signature=spec)
    if not layer.use_bias:
        return kernels, None
    last = layer.data_format == "channels_last"
    axes = list(range(1, len(gz.shape) - 1)) if last else list(range(2, len(gz.shape)))
    return kernels, tf.reduce_sum(gz, axis=axes)


def _linear(layer: Any, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    options = {"strides": layer.strides, "padding": layer.padding,
               "data_format": layer.data_format, "dilation_rate": layer.dilation_rate}
    if isinstance(layer, TRANSPOSED):
        return keras.ops.conv_transpose(x, kernel, output_padding=layer.output_padding,
                                        **{**options, "strides": list(layer.strides)})
    if isinstance(layer, DEPTHWISE):
        return keras.ops.depthwise_conv(x, kernel, **options)
    return layer.convolution_op(x, kernel)


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


_L = keras.layers
TRANSPOSED = (_L.Conv1DTranspose, _L.Conv2DTranspose, _L.Conv3DTranspose)
DEPTHWISE = (_L.DepthwiseConv1D, _L.DepthwiseConv2D)
_NORM = {"weights": ("gamma", "beta"), "activation": False}

RULES: dict[type, Registered] = {
    _L.Dense: Registered("dense", _dense),
    _L.BatchNormalization: Registered("batch norm", _batch_norm, **_NORM),
    _L.LayerNormalization: Registered("layer norm", _layer_norm, **_NORM),
    _L.GroupNormalization: Registered("group norm", _group_norm, **_NORM),
    **{kind: Registered("transposed convolution", _convolution) for kind in TRANSPOSED},
    **{kind: Registered("depthwise convolution", _convolution) for kind in DEPTHWISE},
    **{kind: Registered("convolution", _convolution)
       for kind in (_L.Conv1D, _L.Conv2D, _L.Conv3D)},
}

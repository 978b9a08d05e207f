"""What SENG knows of each kind of Keras layer: its weights, and its per-sample gradients.

A rule is a function ``rule(layer, x, gz, pick)``. ``x`` is the layer's input and ``gz`` the gradient
of the loss by its output before the activation, both with the samples along the first axis.
``pick(t)`` keeps the samples the curvature is taken from; everything that is returned must have gone
through it. A rule returns either

* :class:`Factors` when the gradient of the kernel for sample i is ``A_i G_i^T``,
* :class:`Rows` when a sample uses few rows of a table, or
* a dict from the weight's name in the layer to per-sample gradients ``(samples, *weight.shape)``.

Scaling is not a rule's business: return what ``gz`` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvd_ext.tensorflow.seng import einsum

_L = keras.layers
TRANSPOSED = (_L.Conv1DTranspose, _L.Conv2DTranspose, _L.Conv3DTranspose)
DEPTHWISE = (_L.DepthwiseConv1D, _L.DepthwiseConv2D)
SEPARABLE = (_L.SeparableConv1D, _L.SeparableConv2D)
CONVOLUTIONS = (_L.Conv1D, _L.Conv2D, _L.Conv3D)


Pick = Callable[[tf.Tensor], tf.Tensor]
PerSample = dict[str, tf.Tensor]


@dataclass
class Factors:
    """The kernel's gradient of sample i in group k is ``a[i, k].T @ g[i, k]``.

    ``g`` (samples, groups, kappa, n_G) and ``a`` (samples, groups, kappa, n_A); viewed as
    ``(n_A, groups, n_G)`` the kernel's gradient is that product. The bias gradient is ``g`` summed
    over kappa (a row of ones under A), unless ``rest`` has it, which gives the per-sample gradients of
    other weights by name.
    """

    g: tf.Tensor
    a: tf.Tensor
    rest: PerSample = field(default_factory=dict)


@dataclass
class Rows:
    """Row ``rows[i, k]`` of the table has the gradient ``g[i, k]`` for sample i; those of one row add up.

    ``rows`` (samples, kappa) int64 and ``g`` (samples, kappa, n_G).
    """

    rows: tf.Tensor
    g: tf.Tensor


Rule = Callable[[Any, tf.Tensor, tf.Tensor, Pick], "Factors | Rows | PerSample"]


@dataclass(frozen=True)
class Registered:
    """A rule with what must be known of its layers before the first forward pass.

    ``weights`` are their names in the layer. ``groups(layer)`` gives (groups, n_G, n_A) of the kernel
    for a rule that returns :class:`Factors`, and ``ones`` says whether the bias is a row of ones
    under A. ``activation``: the layer applies one itself, after what ``gz`` is the gradient by.
    ``context(layer, training)`` is called in the forward pass; the tensors it gives are the rule's last
    arguments. ``kernel`` is the name of the weight that factors speak of, ``rows`` says that it is a table
    and the rule gives :class:`Rows`. ``alike(layer)`` gives what of the layer's configuration the rule
    reads, and whether it takes inputs whose last extent is not known: layers of which it is the same share
    one traced function, in which nothing else of the layer may be used. Without it none do.
    """

    kind: str
    rule: Rule
    weights: tuple[str, ...] = ("kernel", "bias")
    groups: Callable[[Any], tuple[int, int, int] | None] | None = None
    ones: bool = True
    activation: bool = True
    context: Callable[[Any, bool], tuple[tf.Tensor, ...]] | None = None
    kernel: str = "kernel"
    rows: bool = False
    alike: Callable[[Any], tuple[Any, bool]] | None = None


def register_seng_rule(layer_type: type, rule: Rule, *, weights: tuple[str, ...] = ("kernel", "bias"),
                       kind: str | None = None, groups: Callable[[Any], tuple[int, int, int]] | None = None,
                       ones: bool = True, activation: bool = False, replace: bool = False) -> None:
    """Teach SENG a layer type of your own; call it before constructing ``SENG``.

    Example, a learned scale of each feature::

        def scale_rule(layer, x, gz, pick):
            return {"scale": pick(x) * pick(gz)}             # (samples, features)

        hvd.register_seng_rule(Scale, scale_rule, weights=("scale",))

    Args:
        layer_type: the layer's class. Subclasses that keep its ``call`` use the rule too.
        rule: see the head of this module.
        weights: the names of the layer's weights that the rule speaks of, its attributes; for a
            rule that returns :class:`Factors` "kernel" and "bias".
        kind: name in the report, the class's name unless given.
        groups: for a rule that returns :class:`Factors`: (groups, n_G, n_A) of a layer's kernel.
        ones: with ``groups``: whether the bias is a row of ones under A.
        activation: whether the layer applies its attribute ``activation`` to what ``gz`` is the
            gradient by.
        replace: allow to replace a rule that exists.

    Raises:
        TypeError: ``layer_type`` is no layer class, or ``rule`` is not callable.
        ValueError: the type has a rule already and ``replace`` is False.
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, keras.Layer)):
        raise TypeError(f"layer_type must be a subclass of keras.Layer, got {layer_type!r}")
    if not callable(rule):
        raise TypeError(f"rule must be a function (layer, x, gz, pick), got {rule!r}")
    if layer_type in RULES and not replace:
        raise ValueError(f"{layer_type.__name__} has a SENG rule already; pass replace=True to "
                         "replace it")
    RULES[layer_type] = Registered(kind or layer_type.__name__, rule, tuple(weights), groups, ones,
                                   activation)


def rule_for(layer: Any) -> Registered | None:
    """The rule of the layer's class, or of the class its ``call`` comes from."""
    for base in type(layer).__mro__:
        if base in RULES:
            return RULES[base] if type(layer).call is base.call else None
    return None


def _dense_rule(layer: Any, x: tf.Tensor, gz: tf.Tensor, pick: Pick) -> Factors:
    return Factors(_as_columns(pick(gz)), _as_columns(pick(x)))


def _as_columns(tensor: tf.Tensor) -> tf.Tensor:
    """(samples, ..., n) as (samples, 1, kappa, n)."""
    between = int(np.prod(tensor.shape[1:-1])) if None not in tensor.shape[1:-1] else -1
    return tf.reshape(tensor, (tf.shape(tensor)[0], 1, between, _last_extent(tensor)))


def _last_extent(tensor: tf.Tensor) -> Any:
    """The last extent, a number where it is known."""
    return tf.shape(tensor)[-1] if tensor.shape[-1] is None else tensor.shape[-1]


def _convolution_rule(layer: Any, x: tf.Tensor, gz: tf.Tensor, pick: Pick) -> Factors:
    x, gz = (_as_channels_last(layer, pick(tensor)) for tensor in (x, gz))
    taken = extract_patches(x, layer)
    groups = x.shape[-1] if isinstance(layer, DEPTHWISE) else layer.groups
    if groups == 1:
        return Factors(_as_columns(gz), taken[:, None])
    samples, kappa, width = tf.shape(taken)[0], taken.shape[1], x.shape[-1] // groups
    a = tf.reshape(taken, (samples, kappa, taken.shape[2] // x.shape[-1], groups, width))
    a = tf.reshape(tf.transpose(a, (0, 3, 1, 2, 4)), (samples, groups, kappa, taken.shape[2] // groups))
    g = tf.reshape(gz, (samples, kappa, groups, gz.shape[-1] // groups))
    return Factors(tf.transpose(g, (0, 2, 1, 3)), a)


def _transposed_rule(layer: Any, x: tf.Tensor, gz: tf.Tensor, pick: Pick) -> Factors:
    # z is the adjoint of a convolution, so x and the patches of gz change places: the kernel
    # (..., out, in) has the gradient sum over positions of patch(gz) · x.
    x, gz = (_as_channels_last(layer, pick(tensor)) for tensor in (x, gz))
    bias = tf.reduce_sum(gz, axis=list(range(1, len(gz.shape) - 1))) if layer.use_bias else None
    return Factors(_as_columns(x), extract_patches(gz, layer)[:, None],
                   {} if bias is None else {"bias": bias})


def kernel_matrix(layer: Any) -> tuple[int, int, int]:
    """(groups, n_G, n_A) of a layer's kernel, which is (n_A, groups, n_G) in Keras' order."""
    shape = [int(extent) for extent in layer.kernel.shape]
    if isinstance(layer, DEPTHWISE):
        return shape[-2], shape[-1], int(np.prod(shape[:-2]))
    groups = layer.groups if isinstance(layer, CONVOLUTIONS) else 1
    return groups, shape[-1] // groups, int(np.prod(shape[:-1]))


def extract_patches(x: tf.Tensor, layer: Any) -> tf.Tensor:
    """What a convolution layer sees of ``x`` (samples, *space, C): (samples, kappa, prod kernel · C).

    Raises:
        ValueError: an extent of the space is not known.
    """
    kernel, strides, dilation = (tuple(getattr(layer, name)) for name in
                                 ("kernel_size", "strides", "dilation_rate"))
    space = x.shape[1:-1]
    if any(extent is None for extent in space):
        raise ValueError(f"SENG needs the extent of what {layer.path} sees; give the model's "
                         f"Input a full shape in place of {tuple(x.shape[1:])}")
    around, reaches = [], []
    for extent, k, s, d in zip(space, kernel, strides, dilation, strict=True):
        reach = d * (k - 1) + 1
        missing = {"valid": 0, "causal": reach - 1,
                   "same": max((-(-extent // s) - 1) * s + reach - extent, 0)}[layer.padding]
        before = missing if layer.padding == "causal" else missing // 2
        around.append([before, missing - before])
        reaches.append((extent + missing - reach) // s * s + 1)  # of one place in the kernel
    if any(sum(pair) for pair in around):
        x = tf.pad(x, [[0, 0], *around, [0, 0]])
    seen = []
    for place in np.ndindex(*kernel):
        starts = [number * d for number, d in zip(place, dilation, strict=True)]
        cut = (slice(start, start + reach, s)
               for start, reach, s in zip(starts, reaches, strides, strict=True))
        seen.append(x[(slice(None), *cut)])
    taken = tf.concat(seen, axis=-1) if len(seen) > 1 else seen[0]
    kappa = int(np.prod(taken.shape[1:-1]))
    return tf.reshape(taken, (tf.shape(taken)[0], kappa, _last_extent(taken)))


def _as_channels_last(layer: Any, tensor: tf.Tensor) -> tf.Tensor:
    return _channels_last(tensor, 1) if layer.data_format == "channels_first" else tensor


def _channels_last(tensor: tf.Tensor, channel: int) -> tf.Tensor:
    order = [axis for axis in range(len(tensor.shape)) if axis != channel] + [channel]
    return tf.transpose(tensor, order)


def _scale_and_offset(normal: tf.Tensor, gz: tf.Tensor, axes: list[int]) -> PerSample:
    """``[sum x_hat gz, sum gz]`` a channel, x_hat taken as given."""
    return {"gamma": tf.reduce_sum(normal * gz, axis=axes), "beta": tf.reduce_sum(gz, axis=axes)}


def _normalize(x: tf.Tensor, axes: list[int], epsilon: float) -> tf.Tensor:
    mean, variance = tf.nn.moments(x, axes, keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + tf.cast(epsilon, x.dtype))


def _moving_moments(layer: Any, training: bool) -> tuple[tf.Tensor, ...]:
    """Mean and variance that a batch norm normalises with; nothing for those of the batch."""
    if training and layer.trainable:
        return ()
    return tf.identity(layer.moving_mean), tf.identity(layer.moving_variance)


def _batch_norm(layer: Any, x: tf.Tensor, gz: tf.Tensor, pick: Pick, *moments: tf.Tensor) -> PerSample:
    channel = layer.axis % len(x.shape)
    axes = [axis for axis in range(len(x.shape)) if axis != channel]
    if not moments:
        # Statistics of the whole batch, not only of the samples that are kept.
        normal = _normalize(x, axes, layer.epsilon)
    else:
        shape = [-1 if axis == channel else 1 for axis in range(len(x.shape))]
        mean, variance = (tf.reshape(tf.cast(moment, x.dtype), shape) for moment in moments)
        normal = (x - mean) * tf.math.rsqrt(variance + tf.cast(layer.epsilon, x.dtype))
    return _scale_and_offset(pick(normal), pick(gz), axes[1:])


def _layer_norm(layer: Any, x: tf.Tensor, gz: tf.Tensor, pick: Pick) -> PerSample:
    axes = _normalized_axes(layer, x)
    rest = [axis for axis in range(1, len(x.shape)) if axis not in axes]
    return _scale_and_offset(_normalize(pick(x), axes, layer.epsilon), pick(gz), rest)


def _group_norm(layer: Any, x: tf.Tensor, gz: tf.Tensor, pick: Pick) -> PerSample:
    x, gz = pick(x), pick(gz)
    channel = layer.axis % len(x.shape)
    size, groups = x.shape[channel], x.shape[channel] if layer.groups == -1 else layer.groups
    moved = _channels_last(x, channel)
    flat = tf.reshape(moved, (tf.shape(moved)[0], -1, groups, size // groups))
    normal = tf.reshape(_normalize(flat, [1, 3], layer.epsilon), tf.shape(moved))
    return _scale_and_offset(normal, _channels_last(gz, channel), list(range(1, len(x.shape) - 1)))


def _rms_norm(layer: Any, x: tf.Tensor, gz: tf.Tensor, pick: Pick) -> PerSample:
    x, gz = pick(x), pick(gz)
    axes = _normalized_axes(layer, x)
    rest = [axis for axis in range(1, len(x.shape)) if axis not in axes]
    square = tf.reduce_mean(x * x, axis=axes, keepdims=True)
    normal = x * tf.math.rsqrt(square + tf.cast(layer.epsilon, x.dtype))
    return {"scale": tf.reduce_sum(normal * gz, axis=rest)}


def _normalized_axes(layer: Any, x: tf.Tensor) -> list[int]:
    """The axes that a layer normalises over, from 0 on."""
    given = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    return sorted(axis % len(x.shape) for axis in given)


def _embedding_rule(layer: Any, x: tf.Tensor, gz: tf.Tensor, pick: Pick) -> Rows:
    x, gz = pick(x), pick(gz)
    samples = tf.shape(gz)[0]
    kappa = tf.size(gz) // tf.maximum(samples * _last_extent(gz), 1)
    return Rows(tf.reshape(tf.cast(x, tf.int64), (samples, kappa)),
                tf.reshape(gz, (samples, kappa, _last_extent(gz))))


def _einsum_dense(layer: Any, x: tf.Tensor, gz: tf.Tensor, pick: Pick) -> Factors | PerSample:
    x, gz, found = pick(x), pick(gz), einsum.axis_roles(layer.equation, len(x.shape))
    sample = found.x[0]
    rest: PerSample = {}
    if layer.bias_axes is not None:
        rest["bias"] = tf.reduce_sum(gz, axis=[
            axis for axis, letter in enumerate(found.z) if axis and letter not in layer.bias_axes])
    if found.order is None:
        return {"kernel": tf.einsum(f"{found.x},{found.z}->{sample}{found.kernel}", x, gz), **rest}

    def matrix(tensor: tf.Tensor, letters: str, own: str) -> tf.Tensor:
        """(samples, 1, kappa, n), the n of the letters ``own``."""
        ordered, cut = tf.einsum(f"{letters}->{sample}{found.between}{own}", tensor), 1 + len(found.between)
        between, last = (int(np.prod(part)) if None not in part else -1
                         for part in (ordered.shape[1:cut], ordered.shape[cut:]))
        return tf.reshape(ordered, (tf.shape(ordered)[0], 1, between, last))

    a, g = matrix(x, found.x, found.summed), matrix(gz, found.z, found.made)
    return Factors(g, a, rest) if found.order == "summed" else Factors(a, g, rest)


def _einsum_matrix(layer: Any) -> tuple[int, int, int] | None:
    """(groups, n_G, n_A) of the kernel; None where no factors stand for its gradient."""
    found = einsum.axis_roles(layer.equation, layer.input_spec.ndim)
    if found.order is None:
        return None
    first = len(found.summed if found.order == "summed" else found.made)
    return 1, int(np.prod(layer.kernel.shape[first:])), int(np.prod(layer.kernel.shape[:first]))


def _table_shape(layer: Any) -> tuple[int, int, int]:
    """(groups, n_G, n_A) of an embedding: a row's gradient times its number, in place of A."""
    return 1, int(layer.embeddings.shape[-1]), 1


def _separable_weights(layer: Any, training: bool) -> tuple[tf.Tensor, ...]:
    return tf.identity(layer.depthwise_kernel), tf.identity(layer.pointwise_kernel)


def _separable_rule(layer: Any, x: tf.Tensor, gz: tf.Tensor, pick: Pick, depthwise: tf.Tensor,
                    pointwise: tf.Tensor) -> Factors:
    """The pointwise kernel as factors, its input the depthwise convolution y; that one's as ``rest``."""
    x, gz = (_as_channels_last(layer, pick(tensor)) for tensor in (x, gz))
    channels, multiplier = int(depthwise.shape[-2]), int(depthwise.shape[-1])
    taken = extract_patches(x, layer)  # (samples, kappa, places · C)
    samples, kappa = tf.shape(taken)[0], taken.shape[1]
    taken = tf.reshape(taken, (samples, kappa, -1, channels))
    depthwise = tf.cast(tf.reshape(depthwise, (-1, channels, multiplier)), x.dtype)
    pointwise = tf.cast(tf.reshape(pointwise, (channels * multiplier, -1)), x.dtype)
    y = tf.reshape(tf.einsum("nkpc,pcm->nkcm", taken, depthwise),
                   (samples, 1, kappa, channels * multiplier))
    g = _as_columns(gz)
    # Matrices: TensorFlow 2.21 with oneDNN writes past the end of a product with transpose_b that broadcasts.
    gy = tf.matmul(tf.reshape(gz, (-1, gz.shape[-1])), pointwise, transpose_b=True)
    gy = tf.reshape(gy, (samples, kappa, channels, multiplier))
    return Factors(g, y, {"depthwise_kernel": tf.einsum("nkpc,nkcm->npcm", taken, gy)})


def _pointwise_matrix(layer: Any) -> tuple[int, int, int]:
    """(groups, n_G, n_A) of the pointwise kernel."""
    return 1, int(layer.pointwise_kernel.shape[-1]), int(layer.pointwise_kernel.shape[-2])


def _convolution_traits(layer: Any) -> tuple[Any, bool]:
    """What the rules of convolutions read of one; grouped ones must know the extent of their channels."""
    groups = None if isinstance(layer, DEPTHWISE) else getattr(layer, "groups", 1)
    loose = groups == 1 and layer.data_format == "channels_last" and not isinstance(layer, SEPARABLE)
    return (isinstance(layer, DEPTHWISE), groups, layer.kernel_size, layer.strides, layer.dilation_rate,
            layer.padding, layer.data_format, layer.use_bias), loose


def _norm_traits(layer: Any) -> tuple[Any, bool]:
    """What the rules of norms read of one."""
    axis = layer.axis if isinstance(layer.axis, int) else tuple(layer.axis)
    return (axis, layer.epsilon, getattr(layer, "groups", None)), not hasattr(layer, "groups")


def _norm_rule(kind: str, rule: Callable[..., PerSample], weights: tuple[str, ...] = ("gamma", "beta"),
               context: Callable[[Any, bool], tuple[tf.Tensor, ...]] | None = None) -> Registered:
    return Registered(kind, rule, weights, activation=False, context=context, alike=_norm_traits)


RULES: dict[type, Registered] = {
    _L.Dense: Registered("dense", _dense_rule, groups=kernel_matrix, alike=lambda layer: ((), True)),
    _L.EinsumDense: Registered("einsum dense", _einsum_dense, groups=_einsum_matrix, ones=False,
                               alike=lambda layer: ((layer.equation, layer.bias_axes), False)),
    _L.Embedding: Registered("embedding", _embedding_rule, ("embeddings",), groups=_table_shape, ones=False,
                             activation=False, kernel="embeddings", rows=True,
                             alike=lambda layer: ((), True)),
    _L.BatchNormalization: _norm_rule("batch norm", _batch_norm, context=_moving_moments),
    _L.LayerNormalization: _norm_rule("layer norm", _layer_norm),
    _L.RMSNormalization: _norm_rule("RMS norm", _rms_norm, ("scale",)),
    _L.GroupNormalization: _norm_rule("group norm", _group_norm),
    **{kind: Registered("transposed convolution", _transposed_rule, groups=kernel_matrix, ones=False,
                        alike=_convolution_traits) for kind in TRANSPOSED},
    **{kind: Registered("depthwise convolution", _convolution_rule, groups=kernel_matrix,
                        alike=_convolution_traits)
       for kind in DEPTHWISE},
    **{kind: Registered("separable convolution", _separable_rule, groups=_pointwise_matrix,
                        weights=("pointwise_kernel", "bias", "depthwise_kernel"), alike=_convolution_traits,
                        context=_separable_weights, kernel="pointwise_kernel") for kind in SEPARABLE},
    **{kind: Registered("convolution", _convolution_rule, groups=kernel_matrix, alike=_convolution_traits)
       for kind in CONVOLUTIONS},
}

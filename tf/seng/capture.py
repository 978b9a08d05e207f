"""Where SENG takes its per-sample gradients: an identity between a layer's linear part and activation.

The gradient of that identity, on refresh steps only, adds this use's per-sample gradients to the
layer's U, or its columns to the layer's factors. Models stay what they are: nothing of their
structure, weights or config changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from hvd_ext.seng import Settings
from hvd_ext.tensorflow.seng.inventory import Layer
from hvd_ext.tensorflow.seng.kernels import choose_samples
from hvd_ext.tensorflow.seng.rules import Factors, Pick


def put(variable: tf.Variable, value: tf.Tensor) -> None:
    """Assign to a variable whose shape may change, which graphs must not take from one assignment.

    TensorFlow's optimizer of graphs infers the shape of every read from the values assigned.
    """
    if tf.executing_eagerly():
        variable.assign(value)
        return
    shape = tf.shape(value) + _zero().read_value()  # known when it runs, and not before
    variable.assign(tf.ensure_shape(tf.reshape(value, shape), variable.shape))


@functools.cache
def _zero() -> tf.Variable:
    with tf.init_scope():
        return tf.Variable(0, trainable=False)


class Captured:
    """What a pass gave a layer, scaled as in SENG eq. 5, until the refresh takes it.

    ``u`` (rho, n) are per-sample gradients, of an implicit layer those of the weights that its
    factors ``g`` (rho, groups, kappa, n_G) and ``a`` (rho, groups, kappa, n_A) do not stand for.
    ``at`` is the pass they belong to: a layer that is used several times adds up. It is
    ``-2 - pass`` when the uses had different numbers of samples.
    """

    def __init__(self, layer: Layer) -> None:
        groups, n_g, n_a = layer.groups or (1, 0, 0)
        rest = sum(layer.sizes[layer.together:])
        self.least = 1 << 30  # what kappa is at least
        self.taps = 0
        with tf.init_scope():
            self.u = self._empty((0, rest), (None, rest), layer)
            self.g = self._empty((0, groups, 0, n_g), (None, groups, None, n_g), layer)
            self.a = self._empty((0, groups, 0, n_a), (None, groups, None, n_a), layer)
            self.at = tf.Variable(-1, dtype=tf.int64, trainable=False)
            self.samples = tf.Variable(0, trainable=False)

    @staticmethod
    def _empty(now: tuple[int, ...], shape: tuple[int | None, ...], layer: Layer) -> tf.Variable:
        return tf.Variable(tf.zeros(now, layer.dtype), trainable=False, shape=shape)

    def clear(self) -> None:
        """Free what was captured; which pass it was stays known."""
        for held in (self.u, self.g, self.a):
            put(held, tf.zeros([0 if extent is None else extent for extent in held.shape],
                               held.dtype))


class Capture:
    """Taps layers.

    Attributes:
        wanted: whether this pass is captured.
        number: which pass this is.

    Args:
        step: the optimizer's step, from which samples are chosen.
        scale: gives the factor of mixed precision in the loss of the pass that is under way.
    """

    def __init__(self, layers: list[Layer], settings: Settings, step: tf.Variable,
                 scale: Callable[[], Any]) -> None:
        self._settings = settings
        self._step = step
        self._scale = scale
        self.of = {layer: Captured(layer) for layer in layers}
        with tf.init_scope():
            self.wanted = tf.Variable(True, trainable=False, name="wanted")
            self.number = tf.Variable(0, dtype=tf.int64, trainable=False, name="pass")
        for layer in layers:
            self._tap(layer)

    def close(self) -> None:
        """Give the layers their own ``call`` back."""
        for layer in self.of:
            layer.layer.__dict__.pop("call", None)

    def _tap(self, layer: Layer) -> None:
        inside = layer.layer
        if "call" in inside.__dict__:
            raise ValueError(f"the layer {layer.name} is tapped already: one SENG a model; call "
                             "close() on the other one first")
        call = inside.call

        @functools.wraps(call)
        def tapped(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not layer.registered.activation:
                context = layer.registered.context
                given = () if context is None else (context(inside, kwargs.get("training") is True),)
                return self._identity(layer, inputs, call(inputs, *args, **kwargs), given)
            activation = inside.activation

            def after_the_tap(z: Any) -> Any:
                z = self._identity(layer, inputs, z)
                return z if activation is None else activation(z)

            # Only while this call runs, so that the layer's config names its own activation.
            object.__setattr__(inside, "activation", after_the_tap)
            try:
                return call(inputs, *args, **kwargs)
            finally:
                object.__setattr__(inside, "activation", activation)

        object.__setattr__(inside, "call", tapped)

    @tf.autograph.experimental.do_not_convert
    def _identity(self, layer: Layer, x: Any, z: Any, given: tuple[Any, ...] = ()) -> Any:
        if not tf.is_tensor(z) or isinstance(z, tf.RaggedTensor):
            return z  # Keras is working out shapes
        x = tf.stop_gradient(tf.convert_to_tensor(x))
        self.of[layer].taps += 1

        @tf.custom_gradient
        def tap(z: tf.Tensor) -> tuple[tf.Tensor, Any]:
            def gradient(gz: tf.Tensor) -> tf.Tensor:
                tf.cond(self.wanted, lambda: self._store(layer, x, gz, given),
                        lambda: tf.constant(False))
                return gz

            return tf.identity(z), gradient

        return tap(z)

    def _store(self, layer: Layer, x: tf.Tensor, gz: tf.Tensor, given: tuple[Any, ...]) -> tf.Tensor:
        captured = self.of[layer]
        x, gz = (tf.cast(tensor, layer.dtype) for tensor in (x, gz))
        pick, factor = self._samples(gz)
        result = layer.registered.rule(layer.layer, x, gz, pick, *given)
        again = tf.equal(captured.at, self.number)
        new: list[tuple[tf.Variable, tf.Tensor, int | None]]
        if isinstance(result, Factors) and layer.plan.implicit:
            if result.g.shape[2] is None:
                raise ValueError(f"SENG needs the number of positions that {layer.name} sees; give "
                                 "the model's Input a full shape")
            captured.least = min(captured.least, int(result.g.shape[2]))
            new = [(captured.g, result.g * factor, 2), (captured.a, result.a, 2)]
            if layer.together < len(layer.weights) and result.bias is not None:
                new.append((captured.u, result.bias * factor, None))
        else:
            new = [(captured.u, _flat(layer, result) * factor, None)]
        samples = tf.shape(new[0][1])[0]
        same = tf.logical_or(tf.logical_not(again), tf.equal(captured.samples, samples))
        more = tf.logical_and(again, same)
        for held, value, axis in new:
            def joined(held: tf.Variable = held, value: tf.Tensor = value,
                       axis: int | None = axis) -> tf.Tensor:
                return held + value if axis is None else tf.concat([held, value], axis)

            value = tf.cond(more, joined, functools.partial(tf.identity, value))
            put(held, value)
        spoiled = tf.logical_or(tf.logical_not(same), tf.equal(captured.at, -2 - self.number))
        captured.samples.assign(samples)
        captured.at.assign(tf.where(spoiled, -2 - self.number, self.number))
        return tf.constant(True)

    def _samples(self, gz: tf.Tensor) -> tuple[Pick, tf.Tensor]:
        """Keeps the chosen samples, and what gz is multiplied with to give ``G_i / sqrt(rho)``."""
        settings = self._settings
        samples = kept = tf.shape(gz)[0]
        chosen = None
        if settings.subsample is not None:
            chosen = choose_samples(samples, settings, self._step.read_value())
            kept = tf.shape(chosen)[0]

        def pick(tensor: tf.Tensor) -> tf.Tensor:
            return tensor if chosen is None else tf.gather(tensor, chosen)

        whole = tf.cast(samples, gz.dtype) if settings.loss_reduction == "mean" else 1.0
        scale = tf.cast(self._scale(), gz.dtype) * settings.loss_scale
        return pick, whole / (scale * tf.sqrt(tf.cast(tf.maximum(kept, 1), gz.dtype)))


def _flat(layer: Layer, result: Any) -> tf.Tensor:
    """Per-sample gradients of all weights side by side: (rho, n)."""
    if isinstance(result, Factors):
        g, a = result.g, result.a
        found = {}
        samples = tf.shape(g)[0]
        if "kernel" in layer.weights:
            kernel = tf.matmul(a, g, transpose_a=True)  # (rho, groups, n_A, n_G)
            found["kernel"] = kernel if g.shape[1] == 1 else tf.transpose(kernel, (0, 2, 1, 3))
        if "bias" in layer.weights:
            found["bias"] = tf.reduce_sum(g, axis=2) if result.bias is None else result.bias
    else:
        found = result
        samples = tf.shape(next(iter(found.values())))[0]
    parts = [tf.reshape(found[name], (samples, size))
             for name, size in zip(layer.weights, layer.sizes, strict=True)]
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis=1)


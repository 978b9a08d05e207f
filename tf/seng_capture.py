"""Where SENG takes its per-sample gradients: an identity between a layer's linear part and activation.

The gradient of that identity, on refresh steps only, adds this use's per-sample gradients to the
layer's U. Models stay what they are: nothing of their structure, weights or config changes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from hvd_ext.tensorflow.seng_layers import Registered, layer_factors
from hvd_ext.tensorflow.variables import as_tf


@dataclass(eq=False)
class Layer:
    """A Keras layer with a rule, its trainable weights, and what was captured of it.

    ``captured`` (samples, n) are the summed per-sample gradients of this pass, ``captured_at`` the
    pass they belong to: a layer that is used several times adds up. Of an ``implicit`` layer the
    factors are captured, with ``kappa`` columns a sample.
    """

    layer: Any
    registered: Registered
    weights: list[Any]
    picked: list[int]
    implicit: bool = False
    kappa: int | None = None
    captured: tf.Variable = field(init=False)
    captured_g: tf.Variable = field(init=False)
    captured_a: tf.Variable = field(init=False)
    captured_at: tf.Variable = field(init=False)

    def __post_init__(self) -> None:
        with tf.init_scope():
            self.captured = tf.Variable(tf.zeros((0, self.n)), trainable=False,
                                        shape=(None, self.n))
            self.captured_g, self.captured_a = (
                tf.Variable(tf.zeros((0, 0, 0, 0)), trainable=False, shape=[None] * 4)
                for _ in range(2))
            self.captured_at = tf.Variable(-1, dtype=tf.int64, trainable=False)

    @property
    def name(self) -> str:
        """The layer's path."""
        return str(self.layer.path)

    @property
    def n(self) -> int:
        """The number of its trainable parameters."""
        return sum(int(tf.TensorShape(weight.shape).num_elements()) for weight in self.weights)


class Capture:
    """Taps layers. ``wanted`` says whether this pass is captured, ``step`` which one it is."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        with tf.init_scope():
            self.wanted = tf.Variable(True, trainable=False)
            self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
        for layer in layers:
            self._tap(layer)

    def close(self) -> None:
        """Give the layers their own ``call`` back."""
        for layer in self.layers:
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
                return self._identity(layer, inputs, call(inputs, *args, **kwargs))
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

    def _identity(self, layer: Layer, x: Any, z: Any) -> Any:
        if not tf.is_tensor(z) or isinstance(z, tf.RaggedTensor):
            return z  # Keras is working out shapes
        x = tf.stop_gradient(tf.convert_to_tensor(x))

        @tf.custom_gradient
        def tap(z: tf.Tensor) -> tuple[tf.Tensor, Any]:
            def gradient(gz: tf.Tensor) -> tf.Tensor:
                tf.cond(self.wanted, lambda: self._store(layer, x, gz), lambda: tf.constant(False))
                return gz

            return tf.identity(z), gradient

        return tap(z)

    def _store(self, layer: Layer, x: tf.Tensor, gz: tf.Tensor) -> tf.Tensor:
        if layer.implicit:
            return self._store_factors(layer, x, gz)
        both = layer.registered.rule(layer.layer, tf.cast(x, tf.float32), tf.cast(gz, tf.float32))
        samples = tf.shape(gz)[0]
        u = tf.concat([tf.reshape(both[place], (samples, -1)) for place in layer.picked], axis=1)
        again = tf.logical_and(tf.equal(layer.captured_at, self.step),
                               tf.equal(tf.shape(layer.captured)[0], samples))
        u = tf.cond(again, lambda: layer.captured + u, lambda: u)
        layer.captured.assign(tf.ensure_shape(u, (None, layer.n)))
        layer.captured_at.assign(self.step)
        return tf.constant(True)

    def _store_factors(self, layer: Layer, x: tf.Tensor, gz: tf.Tensor) -> tf.Tensor:
        g, a = layer_factors(layer.layer, tf.cast(x, tf.float32), tf.cast(gz, tf.float32))
        if g.shape[-1] is None:
            raise ValueError(f"SENG needs the number of positions that {layer.name} sees; give the "
                             "model's Input a full shape")
        layer.kappa = int(g.shape[-1])
        layer.captured_g.assign(g)
        layer.captured_a.assign(a)
        # Used again in this pass: its factors would have to be joined, so that it has none.
        again = tf.logical_or(tf.equal(layer.captured_at, self.step),
                              tf.equal(layer.captured_at, -2 - self.step))
        layer.captured_at.assign(tf.where(again, -2 - self.step, self.step))
        return tf.constant(True)


def find_weights(layer: Any, registered: Registered) -> tuple[list[Any], list[int]]:
    """The layer's trainable weights that the rule speaks of, and which of its two each is."""
    trainable = {id(as_tf(weight)) for weight in layer.trainable_weights}
    found = [(getattr(layer, name, None), place)
             for place, name in enumerate(registered.weights)]
    kept = [(weight, place) for weight, place in found
            if weight is not None and id(as_tf(weight)) in trainable]
    return [weight for weight, _ in kept], [place for _, place in kept]

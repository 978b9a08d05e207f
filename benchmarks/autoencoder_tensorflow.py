"""The autoencoder of ``seng_autoencoder`` in Keras, from PyTorch's initial weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from torch import nn

from benchmarks.autoencoder_torch import SIZES
from benchmarks.autoencoder_torch import autoencoder as in_torch


def autoencoder(seed: int) -> keras.Model:
    """The network, with the weights that PyTorch gives it."""
    last = len(SIZES) - 2
    model = keras.Sequential([keras.Input(SIZES[:1])] + [
        keras.layers.Dense(size, activation=None if number == last else "tanh")
        for number, size in enumerate(SIZES[1:])])
    linear = [layer for layer in in_torch(seed) if isinstance(layer, nn.Linear)]
    for layer, source in zip(model.layers, linear, strict=True):
        layer.set_weights([source.weight.detach().numpy().T, source.bias.detach().numpy()])
    return model


def start(method: str, settings: dict[str, Any], seed: int, digits: np.ndarray,
          seng_options: dict[str, Any]) -> tuple[Callable[[np.ndarray], None], Callable[[], float]]:
    """A function that takes a step on the rows it is given, and one that gives the loss over all."""
    import hvd_ext.tensorflow as hvd

    hvd.init()
    rows = tf.constant(digits)
    model = autoencoder(seed)
    seng = None
    if method == "Adam":
        optimizer: keras.Optimizer = keras.optimizers.Adam(settings["lr"], epsilon=1e-8)
    else:
        optimizer = keras.optimizers.SGD(settings["lr"], momentum=settings.get("momentum", 0.9))
    if method == "SENG":
        seng = hvd.SENG(model, damping=settings["damping"], update_freq=settings["update_freq"],
                        **seng_options)
    optimizer = hvd.DistributedOptimizer(optimizer, preconditioner=seng)
    optimizer.build(model.trainable_variables)

    def loss_of(x: tf.Tensor) -> tf.Tensor:
        count = tf.cast(tf.shape(x)[0], x.dtype)
        return 0.5 * tf.reduce_sum((model(x, training=True) - x) ** 2) / count

    @tf.function(reduce_retracing=True)
    def step(picked: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = loss_of(tf.gather(rows, picked))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    whole = tf.function(lambda: loss_of(rows))
    return lambda picked: step(tf.constant(picked)), lambda: float(whole())

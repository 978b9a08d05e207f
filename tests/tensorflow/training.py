"""Small Keras trainings by name, run alike on ranks and, with the joined batch, in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

BATCH = 4  # rows a rank and step
STEPS = 6


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows for 4 ranks; rank r of M takes rows r::M, so that batches join to the batches of one."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * BATCH * STEPS, 5)).astype("float32")
    return x, (x @ rng.normal(size=(5, 3)) + 0.1 * x[:, :3] ** 2).astype("float32")


def dense_model() -> keras.Model:
    """Two Dense layers, of the same weights wherever it is made."""
    keras.utils.set_random_seed(7)
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(8, activation="tanh"),
                             keras.layers.Dense(3)])


def embedding_model() -> keras.Model:
    """Token numbers of the first feature through an embedding, whose gradient is IndexedSlices."""
    keras.utils.set_random_seed(7)
    return keras.Sequential([keras.Input((5,), dtype="int32"), keras.layers.Embedding(6, 4),
                             keras.layers.Flatten(), keras.layers.Dense(3)])


def schedule() -> Any:
    """A learning rate that changes with the step."""
    return keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.7)


O = keras.optimizers  # noqa: E741
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "momentum": lambda: O.SGD(0.1, momentum=0.9, nesterov=True),
    "schedule": lambda: O.Adam(schedule()),
    "clipnorm": lambda: O.SGD(0.1, clipnorm=0.05),
    "global_clipnorm": lambda: O.SGD(0.1, global_clipnorm=0.1),
    "clipvalue": lambda: O.SGD(0.1, clipvalue=0.02),
    "weight_decay": lambda: O.AdamW(0.01, weight_decay=0.1),
    "ema": lambda: O.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
    "loss_scale_factor": lambda: O.SGD(0.1, loss_scale_factor=8.0),
    "accumulation": lambda: O.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2),
    "multi": lambda: O.MultiOptimizer(O.OptimizerMap(
        O.SGD(0.1), {".*bias": O.Adam(0.01, clipnorm=0.1)})),
    "muon": lambda: O.Muon(0.01),
}


class OwnStep(keras.Model):
    """A functional model with a train_step of its own."""

    def train_step(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


def fit(model: keras.Model, optimizer: Any, rank: int, size: int, *, epochs: int = 2,
        callbacks: Any = None, tokens: bool = False, **options: Any) -> keras.Model:
    """``model.fit`` on the rows of one of ``size`` ranks, in order, with the mean squared error."""
    x, y = data()
    x, y = x[: size * BATCH * STEPS][rank::size], y[: size * BATCH * STEPS][rank::size]
    if tokens:
        x = (np.abs(x) * 3).astype("int32") % 6
    model.compile(optimizer, "mse", **options)
    model.fit(x, y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0,
              callbacks=callbacks or [])
    return model


def fit_joined(model: keras.Model, optimizer: Any, size: int, *, epochs: int = 2,
               tokens: bool = False, **options: Any) -> keras.Model:
    """The same in one process on the joined batches."""
    x, y = data()
    x, y = x[: size * BATCH * STEPS], y[: size * BATCH * STEPS]
    if tokens:
        x = (np.abs(x) * 3).astype("int32") % 6
    model.compile(optimizer, "mse", **options)
    model.fit(x, y, batch_size=size * BATCH, epochs=epochs, shuffle=False, verbose=0)
    return model


def weights(model: keras.Model) -> list[np.ndarray]:
    """The model's weights as arrays."""
    return [np.array(weight) for weight in model.get_weights()]

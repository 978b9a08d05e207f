"""TensorFlow and Keras for the suite: a few tensors or a network under ``hvd.DistributedOptimizer``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hvd_ext.tensorflow.keras as hvd
from tests.conformance.references import LR, MU, Tensors
from tests.conformance.trainer import SavedTrainer
from tests.tensorflow import checkpointed
from tests.tensorflow.sign_reducer import Sign, SignReducer

OUTPUT_AXIS = -1


class TensorsModel(keras.Model):
    """Weights p0, p1, ... and nothing else."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: str, seed: int) -> None:
        super().__init__(dtype=dtype)
        rng = np.random.default_rng(seed)
        for number, shape in enumerate(shapes):
            weight = self.add_weight(shape=shape, name=f"p{number}", dtype=dtype)
            weight.assign(rng.standard_normal(shape))
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x


def _network(dtype: str, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential([
        keras.Input((6,), dtype=dtype), layers.Dense(9, dtype=dtype),
        layers.BatchNormalization(dtype=dtype), layers.Activation("tanh", dtype=dtype),
        layers.Dropout(0.1, seed=seed, dtype=dtype), layers.Dense(3, dtype=dtype)])


class Trainer(SavedTrainer):
    """One model with its optimizer; see ``tests/conformance/properties.py``."""

    hvd, state_class, digest_of = hvd, hvd.elastic.KerasState, checkpointed.digest

    def __init__(self, method: Any, shapes: Sequence[tuple[int, ...]], *, options: Any = None,
                 dtype: str = "float64", passes: int = 1, seed: int = 0, process_set: Any = None) -> None:
        if not hasattr(hvd.Compression, "sign"):
            hvd.register_reducer(Sign, SignReducer)
        self.dtype, self.network = dtype, method.network
        self.model = _network(dtype, seed) if method.network else TensorsModel(shapes, dtype, seed)
        self.variables = self.model.trainable_variables
        arguments = (options or method.options)(hvd)
        if "seng" in arguments:
            arguments["preconditioner"] = hvd.SENG(self.model, **arguments.pop("seng"))
        if process_set is not None:
            arguments["process_set"] = process_set
        inner = {"sgd": lambda: keras.optimizers.SGD(LR),
                 "momentum": lambda: keras.optimizers.SGD(LR, momentum=MU),
                 "amsgrad": lambda: hvd.AMSGrad(LR)}[method.optimizer]()
        self.optimizer = hvd.DistributedOptimizer(inner, backward_passes_per_step=passes, **arguments)
        self.optimizer.build(self.variables)
        if method.network:
            self.model.compile(self.optimizer, "mse")
        self._traced = tf.function(self._apply, autograph=False)

    def _apply(self, *gradients: tf.Tensor) -> None:
        self.optimizer.apply(gradients, self.variables)

    @property
    def tensors(self) -> Tensors:
        return Tensors(tuple(tuple(v.shape) for v in self.variables), OUTPUT_AXIS)

    def step(self, passes: Sequence[Sequence[np.ndarray]], *, other_way: bool = False) -> None:
        """One step whose micro-batches have these gradients, without a graph if ``other_way``."""
        for gradients in passes:
            (self._apply if other_way else self._traced)(*[tf.constant(g, self.dtype) for g in gradients])

    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        """One step of the network on a batch."""
        self.model.train_on_batch(x, y)

    def weights(self) -> np.ndarray:
        return np.concatenate([np.asarray(v.numpy(), np.float64).ravel() for v in self.variables])

    def bits(self) -> bytes:
        return b"".join(v.numpy().tobytes() for v in self.variables)

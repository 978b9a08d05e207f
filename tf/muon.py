"""Muon for convolutions too: a variable of more than two axes is orthogonalised as a matrix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="hvd_ext")
class Muon(keras.optimizers.Muon):
    """``keras.optimizers.Muon`` that takes convolutions: their kernels are matrices of (positions · in, out).

    That is how Muon's author trains convolutions (Jordan et al. 2024, "Muon: An optimizer for hidden layers
    in neural networks"); Keras' own leaves them to AdamW. Matrices, vectors and embeddings are updated as by
    Keras' own. Depthwise kernels make poor matrices: name their layers in ``exclude_layers``.

    The arguments are those of ``keras.optimizers.Muon``.
    """

    def _should_use_adamw(self, variable: Any) -> bool:
        if len(variable.shape) <= 2:
            return bool(super()._should_use_adamw(variable))
        return any(re.search(keyword, variable.path) for keyword in self.exclude_layers)

    def _muon_update_step(self, gradient: Any, variable: Any, lr: Any, m: Any) -> None:
        if len(variable.shape) == 2:
            super()._muon_update_step(gradient, variable, lr, m)
            return
        gradient = tf.cast(gradient, m.dtype)
        self.assign_add(m, gradient + m * (self.momentum - 1))
        direction = gradient + self.momentum * m if self.nesterov else tf.convert_to_tensor(m)
        matrix = tf.reshape(direction, matrix_shape(variable.shape))
        update = self.lr_adjust(lr * self.zeropower_via_newtonschulz5(matrix, self.ns_steps))
        self.assign_sub(variable, tf.reshape(update, variable.shape))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the matrix that a variable is taken for."""
    return prod(shape[:-1]), shape[-1]

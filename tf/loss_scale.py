"""The factor that mixed precision puts into the loss, and with it into every gradient."""

from __future__ import annotations

from typing import Any

import keras

from hvd_ext.tensorflow.variables import as_tf


def loss_scale(optimizer: Any) -> Any:
    """What the ``scale_loss`` of a Keras optimizer multiplies with; 1 for None.

    A number, or the variable that holds it, to be read when a traced function runs.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return as_tf(optimizer.dynamic_scale) if optimizer.built else optimizer.initial_scale
    return getattr(optimizer, "loss_scale_factor", None) or 1.0

"""AMSGrad as SPARS-AMS has it: epsilon inside the root, no bias correction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from hvd_ext import checks


@keras.saving.register_keras_serializable(package="hvd_ext")
class AMSGrad(keras.optimizers.Optimizer):
    """SPARS-AMS Algorithm 1, lines 12 to 16 (Algorithm 2, lines 7 to 10).

    ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``, ``vhat = max(vhat, v)``,
    ``w = w - lr m / sqrt(vhat + eps)``. ``keras.optimizers.Adam(amsgrad=True)`` differs: it corrects
    for the start and adds epsilon outside the root.

    The state of float16 and bfloat16 variables is float32, and so is the arithmetic: eps underflows in
    float16, and squares of gradients with it. The weights are rounded once a step.

    Args:
        learning_rate: a number, or a Keras learning-rate schedule.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to vhat under the root; above 0.
        weight_decay: added to the gradient as ``weight_decay * w``; with ``decoupled_weight_decay``
            the weights shrink by ``lr * weight_decay`` instead, untouched by the moments.
        decoupled_weight_decay: see ``weight_decay``.
        name: of the optimizer.
        kwargs: ``clipnorm``, ``use_ema`` and the other arguments of every Keras optimizer.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its limits.
    """

    def __init__(self, learning_rate: Any = 1e-3, *, betas: Sequence[float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0,
                 decoupled_weight_decay: bool = False, name: str = "amsgrad",
                 **kwargs: Any) -> None:
        if not callable(learning_rate) and not isinstance(
                learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            learning_rate = checks.check_float("learning_rate", learning_rate, low=0.0)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas must be a pair of numbers, got {betas!r}; pass "
                            "betas=(0.9, 0.999)")
        for which, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
            checks.check_float(which, beta, low=0.0, high=1.0, open_high=True)
        checks.check_float("eps", eps, low=0.0, open_low=True,
                           hint="it stands under the root with vhat, which is 0 at first")
        decay = checks.check_float("weight_decay", 0.0 if weight_decay is None else weight_decay, low=0.0)
        decoupled = checks.check_bool("decoupled_weight_decay", decoupled_weight_decay)
        super().__init__(learning_rate, name=name,
                         weight_decay=decay if decoupled and decay else None, **kwargs)
        self.betas = tuple(float(beta) for beta in betas)
        self.eps = float(eps)
        self.decay = decay
        self.decoupled_weight_decay = decoupled

    def build(self, variables: Sequence[Any]) -> None:
        if self.built:
            return
        super().build(variables)
        self._moments, self._squares, self._largest = self.add_optimizer_variables(
            variables, ["moment", "square", "largest_square"])

    def add_variable_from_reference(self, reference_variable: Any, name: Any = None,
                                    initializer: Any = "zeros") -> Any:
        """Keras' own, float32 where the model's variable has less."""
        half = keras.backend.standardize_dtype(reference_variable.dtype) in ("float16", "bfloat16")
        if not half or name not in ("moment", "square", "largest_square"):
            return super().add_variable_from_reference(reference_variable, name, initializer)
        path = getattr(reference_variable, "path", reference_variable.name).replace("/", "_")
        return self.add_variable(shape=reference_variable.shape, initializer=initializer, dtype="float32",
                                 name=f"{path.replace(':', '_')}_{name}")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        moment, square, largest = (kind[index] for kind in
                                   (self._moments, self._squares, self._largest))
        dtype, weight = moment.dtype, tf.convert_to_tensor(variable)
        gradient = tf.cast(tf.convert_to_tensor(gradient), dtype)
        lr, (beta1, beta2) = tf.cast(learning_rate, dtype), self.betas
        if self.decay and not self.decoupled_weight_decay:
            gradient = gradient + self.decay * tf.cast(weight, dtype)
        self.assign(moment, beta1 * moment + (1.0 - beta1) * gradient)  # line 13
        self.assign(square, beta2 * square + (1.0 - beta2) * gradient * gradient)  # line 14
        self.assign(largest, tf.maximum(largest.value, square.value))  # line 15
        step = lr * moment / tf.sqrt(largest + tf.cast(self.eps, dtype))
        if variable.dtype == dtype:
            self.assign_sub(variable, step)  # line 16
        else:
            self.assign(variable, tf.cast(tf.cast(weight, dtype) - step, variable.dtype))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "betas": list(self.betas), "eps": self.eps,
                "weight_decay": self.decay, "decoupled_weight_decay": self.decoupled_weight_decay}

"""What scripts written for Keras 2 call and Keras 3 no longer has, on every optimizer and model.

Horovod's examples call ``optimizer.variables()``, ``optimizer.lr.assign(...)`` and
``model.compile(experimental_run_tf_function=False)``, also where nothing is distributed. A subclass
would not be met there, so Keras' own classes take them from the import of this package on.
"""

from __future__ import annotations

import functools
from typing import Any

import keras

from hvd_ext.tensorflow.variables import CallableList

UNSCALED = "_hvd_ext_unscaled"  # the gradients that get_unscaled_gradients was given since the last step
DONE = "_hvd_ext_keras2"


def install_keras2() -> None:
    """Extend Keras' optimizers and models. Does nothing when called again."""
    base = next(kind for kind in keras.optimizers.Optimizer.__mro__ if "variables" in kind.__dict__)
    if DONE in base.__dict__:
        return
    setattr(base, DONE, True)
    for kind in (base, keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer):
        if "variables" in kind.__dict__:
            kind.variables = _callable_variables(kind.__dict__["variables"])
    if not hasattr(base, "lr"):
        base.lr = property(_get_lr, _set_lr, doc="``learning_rate``, as Keras 2 called it.")
    _install_loss_scale(keras.optimizers.LossScaleOptimizer)
    trainer = next(kind for kind in keras.Model.__mro__ if "compile" in kind.__dict__)
    trainer.compile = _without_tf_function(trainer.__dict__["compile"])


def _callable_variables(variables: Any) -> property:
    """The property ``variables``, whose list may be called as Keras 2's method was."""
    return property(lambda self: CallableList(variables.fget(self)), doc=variables.__doc__)


def _install_loss_scale(scaled: type) -> None:
    """``get_scaled_loss`` and ``get_unscaled_gradients``, with which loops of Keras 2 do what Keras 3's
    ``apply`` does: gradients that were divided by the scale are multiplied with it before they are again.
    """
    if hasattr(scaled, "get_scaled_loss"):
        return
    apply = scaled.apply  # type: ignore[attr-defined]

    def scale_of(optimizer: Any) -> Any:
        return optimizer.dynamic_scale if optimizer.built else optimizer.initial_scale

    def get_scaled_loss(self: Any, loss: Any) -> Any:
        """The loss times the scale; ``scale_loss`` in Keras 3."""
        return loss() * scale_of(self) if callable(loss) else self.scale_loss(loss)

    def get_unscaled_gradients(self: Any, grads: Any) -> list[Any]:
        """The gradients divided by the scale, for clipping and the like; then ``apply_gradients``."""
        grads = list(grads)
        vars(self)[UNSCALED] = grads
        return [None if one is None else keras.ops.divide(one, scale_of(self)) for one in grads]

    @functools.wraps(apply)
    def apply_unscaled(self: Any, grads: Any, trainable_variables: Any = None) -> None:
        grads, scaled_ones = list(grads), vars(self).pop(UNSCALED, None)
        if scaled_ones is not None and not any(
                one is other and one is not None for one, other in zip(grads, scaled_ones, strict=False)):
            scale = scale_of(self)
            grads = [None if one is None else keras.ops.multiply(one, scale) for one in grads]
        apply(self, grads, trainable_variables)

    scaled.get_scaled_loss = get_scaled_loss  # type: ignore[attr-defined]
    scaled.get_unscaled_gradients = get_unscaled_gradients  # type: ignore[attr-defined]
    scaled.apply = apply_unscaled  # type: ignore[attr-defined]


def _get_lr(optimizer: Any) -> Any:
    own = vars(optimizer)
    return own["lr"] if "lr" in own else optimizer.learning_rate  # noqa: SIM401  (a schedule is not free)


def _set_lr(optimizer: Any, value: Any) -> None:
    if "_learning_rate" in vars(optimizer):
        optimizer.learning_rate = value
    else:  # a class that keeps an attribute of this name for itself, before Keras' own __init__
        vars(optimizer)["lr"] = value


def _without_tf_function(compile_model: Any) -> Any:
    """``compile`` that leaves out TensorFlow 2.0's ``experimental_run_tf_function``."""

    @functools.wraps(compile_model)
    def compile(self: Any, *args: Any, **options: Any) -> Any:
        options.pop("experimental_run_tf_function", None)
        return compile_model(self, *args, **options)

    return compile

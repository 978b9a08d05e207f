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

DONE = "_hvd_ext_keras2"


def install() -> None:
    """Extend Keras' optimizers and models. Does nothing when called again."""
    base = next(kind for kind in keras.optimizers.Optimizer.__mro__ if "variables" in kind.__dict__)
    if DONE in base.__dict__:
        return
    setattr(base, DONE, True)
    for kind in (base, keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer):
        if "variables" in kind.__dict__:
            kind.variables = _callable(kind.__dict__["variables"])
    if not hasattr(base, "lr"):
        base.lr = property(_get_lr, _set_lr, doc="``learning_rate``, as Keras 2 called it.")
    trainer = next(kind for kind in keras.Model.__mro__ if "compile" in kind.__dict__)
    trainer.compile = _without_tf_function(trainer.__dict__["compile"])


def _callable(variables: Any) -> property:
    """The property ``variables``, whose list may be called as Keras 2's method was."""
    return property(lambda self: CallableList(variables.fget(self)), doc=variables.__doc__)


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

"""What Keras decides without asking the optimizer: two decisions that ranks must share, and a scale.

Keras offers no hook for them, so three methods of its classes are extended once, when the first
distributed optimizer is made. They behave as before for every other optimizer. A ``LossScaleOptimizer``
around a distributed one, which ``model.compile`` makes under mixed_float16, has its public methods too.
"""

from __future__ import annotations

import functools
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

ATTRIBUTE = "_hvd_ext"
# Methods that Keras' own optimizers do not have.
PUBLIC_METHODS = ("exact_weights", "flush", "register_local_var", "report", "reset_per_rank_state")


def wrapper_of(optimizer: Any) -> Any:
    """What a distributed optimizer has beyond its own, also inside a ``LossScaleOptimizer``; or None."""
    return getattr(distributed_part(optimizer), ATTRIBUTE, None)


def distributed_part(optimizer: Any) -> Any:
    """The distributed optimizer itself, also inside a ``LossScaleOptimizer``; None where none is."""
    if optimizer is None or getattr(optimizer, ATTRIBUTE, None) is not None:
        return optimizer
    return distributed_part(getattr(optimizer, "inner_optimizer", None))


def require_tensorflow_backend(what: str) -> None:
    """Refuse Keras on another backend, where its optimizers never see TensorFlow's gradients.

    Raises:
        RuntimeError: Keras runs on another backend.
    """
    backend = keras.backend.backend()
    if backend != "tensorflow":
        way = "; or train with hvd_ext.torch" if backend == "torch" else ""
        raise RuntimeError(
            f"{what} needs Keras on the TensorFlow backend, Keras runs on {backend!r}: set "
            f"KERAS_BACKEND=tensorflow in the environment before Keras is imported{way}")


def refuse_xla(what: str) -> None:
    """Refuse to be traced for XLA, which has no kernels for Horovod's collectives.

    Raises:
        NotImplementedError: the function being traced will be compiled by XLA.
    """
    if tf.executing_eagerly():
        return
    if GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise NotImplementedError(
            f"{what} inside a function compiled with jit_compile=True: XLA cannot run Horovod's "
            "collectives; pass jit_compile=False to model.compile (or tf.function). What is "
            "worth compiling can be a jit-compiled function of its own, called from the step")


@functools.cache
def install_hooks() -> None:
    """Extend Keras' classes. Does nothing when called again."""
    scaled = keras.optimizers.LossScaleOptimizer
    check_finite = scaled.check_finite

    @functools.wraps(check_finite)
    def check_finite_on_all_ranks(self: Any, grads: Any) -> Any:
        # The answer decides whether the inner optimizer, with its collectives, runs at all.
        finite = check_finite(self, grads)
        wrapper = wrapper_of(self)
        if wrapper is None:
            return finite
        refuse_xla("hvd.DistributedOptimizer")
        if wrapper.scaling is not None:
            finite = wrapper.scaling.counts_as_finite(finite)
        finite = wrapper.collectives.all_true(finite, f"{wrapper.reducer.prefix}/finite")
        wrapper.end_skipped_pass(tf.logical_not(finite))
        return finite

    scaled.check_finite = check_finite_on_all_ranks
    scale_loss = scaled.scale_loss

    @functools.wraps(scale_loss)
    def scale_loss_and_say_so(self: Any, loss: Any) -> Any:
        wrapper = wrapper_of(self)
        if wrapper is not None:
            wrapper.loss_scaled_by(self)
        return scale_loss(self, loss)

    scaled.scale_loss = scale_loss_and_say_so

    load_own_variables, set_weights = scaled.load_own_variables, scaled.set_weights

    @functools.wraps(load_own_variables)
    def load_scale(self: Any, store: Any) -> None:
        if wrapper_of(self) is None:
            load_own_variables(self, store)
            return
        for number, variable in enumerate(self._variables):  # the inner optimizer's are in the file again
            if str(number) in store.keys():  # noqa: SIM118  (of Keras' stores)
                variable.assign(store[str(number)])

    scaled.load_own_variables = load_scale

    @functools.wraps(set_weights)
    def set_all_weights(self: Any, weights: Any) -> None:
        set_weights(self, weights)
        if wrapper_of(self) is not None:
            self.inner_optimizer.set_weights(list(weights)[len(self._variables):])

    scaled.set_weights = set_all_weights

    def find_in_inner(self: Any, name: str) -> Any:
        # Called for what is nowhere else.
        inner = self.__dict__.get("inner_optimizer")
        if name in PUBLIC_METHODS and wrapper_of(inner) is not None:
            return getattr(distributed_part(inner), name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    scaled.__getattr__ = find_in_inner

    trainer = next(kind for kind in keras.Model.__mro__
                   if "_resolve_auto_jit_compile" in kind.__dict__)
    resolve = trainer._resolve_auto_jit_compile

    @functools.wraps(resolve)
    def resolve_auto_jit_compile(self: Any) -> Any:
        if wrapper_of(getattr(self, "optimizer", None)) is not None:
            return False
        return resolve(self)

    trainer._resolve_auto_jit_compile = resolve_auto_jit_compile

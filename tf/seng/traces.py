"""One traced function for all layers of a kind.

What a layer needs at a refresh is some hundred operations. Traced and optimised for each layer of a
model of a hundred layers, that would be most of the time to the first step; traced once for a kind
of layer and shape, a graph holds one call a layer. Variables are passed as their handles, for a
function that closes over a variable belongs to one layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import tensorflow as tf


class Traces:
    """Functions by their kind and the kinds of their tensors."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self.said: dict[Hashable, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._made)

    def call(self, function: Callable[..., Any], key: Hashable, given: Sequence[Any], *,
             shapes: Sequence[Any] | None = None, inline: bool = False) -> Any:
        """``function(*given)``, traced the first time for this key and these kinds of tensors.

        Args:
            function: tensors in, tensors out. It may depend on nothing but ``key`` beside them.
            given: tensors and variables; of a variable the function gets the handle, see
                :func:`read` and :func:`write`.
            shapes: of each tensor the shape that is traced, None where it is the tensor's own.
            inline: let TensorFlow put the function's operations in place of the call.
        """
        tensors = [one.handle if isinstance(one, tf.Variable) else tf.convert_to_tensor(one)
                   for one in given]
        specs = tuple(
            tf.TensorSpec([] if tensor.dtype == tf.resource else
                          tensor.shape if shape is None else shape, tensor.dtype)
            for tensor, shape in zip(tensors, shapes or [None] * len(tensors), strict=True))
        name = (key, specs, inline)
        if name not in self._made:
            with tf.init_scope():
                attributes = None if inline else {"_noinline": True}
                self._made[name] = tf.function(
                    function, autograph=False, experimental_attributes=attributes
                ).get_concrete_function(*specs)
        if inline:
            return self._made[name](*tensors)
        with _as_it_is():
            return self._made[name](*tensors)


def apart(function: Callable[[], Any]) -> Any:
    """``function()`` as one call in the graph being traced, which TensorFlow does not optimize with it."""
    with _as_it_is():
        return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})()


@contextlib.contextmanager
def _as_it_is() -> Iterator[None]:
    """Calls made here run without TensorFlow's optimization of graphs: it would take longer than they do."""
    options = tf.config.optimizer
    if options.get_experimental_options().get("disable_meta_optimizer", False):
        yield
        return
    options.set_experimental_options({"disable_meta_optimizer": True})
    try:
        yield
    finally:
        options.set_experimental_options({"disable_meta_optimizer": False})


def read(handle: tf.Tensor, dtype: tf.DType, shape: Any = None) -> tf.Tensor:
    """The value of the variable behind a handle."""
    value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
    return value if shape is None else tf.ensure_shape(value, shape)


def write(handle: tf.Tensor, value: tf.Tensor) -> None:
    """Assign to the variable behind a handle."""
    tf.raw_ops.AssignVariableOp(resource=handle, value=value)

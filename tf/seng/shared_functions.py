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


class SharedFunctions:
    """Functions by their kind and the kinds of their tensors; the handles of many variables as one tensor.

    A graph takes in each handle on its own, and so does every graph around it: with some thousand of them
    that takes longer than all else in a branch. One tensor of handles is taken in once.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self.said: dict[Hashable, dict[str, Any]] = {}
        self._places: dict[int, int] = {}
        self._packed: Any = None
        self._open: list[tuple[Any, list[tf.Tensor]]] = []

    def __len__(self) -> int:
        return len(self._made)

    def pack_handles(self, variables: Sequence[tf.Variable]) -> None:
        """Take these variables' handles together, where all of them are in the CPU's memory."""
        if variables and all("GPU" not in one.device for one in variables):
            with tf.init_scope():
                self._packed = tf.stack([one.handle for one in variables])
            self._places = {id(one): place for place, one in enumerate(variables)}

    @contextlib.contextmanager
    def unpacked_handles(self) -> Iterator[None]:
        """In the graph being traced, the packed handles are taken from their tensor from here on.

        TensorFlow orders operations by the tensor that a handle comes from: what uses a variable here and
        what uses its own handle must be ordered by control dependencies, or by another handle of both.
        """
        if self._packed is None or tf.executing_eagerly():
            yield
            return
        self._open.append((tf.compat.v1.get_default_graph(), tf.unstack(self._packed)))
        try:
            yield
        finally:
            self._open.pop()

    def variable_handle(self, one: tf.Variable) -> tf.Tensor:
        """The variable's handle, for the graph being traced."""
        place = self._places.get(id(one))
        if self._open and place is not None and self._open[-1][0] is tf.compat.v1.get_default_graph():
            return self._open[-1][1][place]
        return one.handle

    def variable_value(self, one: tf.Variable) -> tf.Tensor:
        """The variable's value, for the graph being traced."""
        return read_handle(self.variable_handle(one), one.dtype, one.shape)

    def call_shared(self, function: Callable[..., Any], key: Hashable, given: Sequence[Any], *,
                    shapes: Sequence[Any] | None = None, inline: bool = False) -> Any:
        """``function(*given)``, traced the first time for this key and these kinds of tensors.

        Args:
            function: tensors in, tensors out. It may depend on nothing but ``key`` beside them.
            given: tensors and variables; of a variable the function gets the handle, see
                :func:`read_handle` and :func:`write_handle`.
            shapes: of each tensor the shape that is traced, None where it is the tensor's own.
            inline: let TensorFlow put the function's operations in place of the call.
        """
        tensors = [self.variable_handle(one) if isinstance(one, tf.Variable) else tf.convert_to_tensor(one)
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


def outside_trace(function: Callable[[], Any]) -> Any:
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


def read_handle(handle: tf.Tensor, dtype: tf.DType, shape: Any = None) -> tf.Tensor:
    """The value of the variable behind a handle."""
    value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)
    return value if shape is None else tf.ensure_shape(value, shape)


def write_handle(handle: tf.Tensor, value: tf.Tensor) -> None:
    """Assign to the variable behind a handle."""
    tf.raw_ops.AssignVariableOp(resource=handle, value=value)

"""The asynchronous parameter server for TensorFlow and Keras: how a model becomes flat, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_ext.async_ps.core import ParameterServer as Core
from hvd_ext.async_ps.model import HostBuffer


class TensorFlowModel:
    """Variables; they travel as float64 if any is float64, else as float32.

    Args:
        variables: ``tf.Variable`` or Keras variables, of real floating point.

    Raises:
        TypeError: a variable is not real floating point.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self.variables = list(variables)
        self.gradients: Sequence[Any] = [None] * len(self.variables)
        kinds = [tf.as_dtype(v.dtype) for v in self.variables]
        for index, kind in enumerate(kinds):
            if not kind.is_floating:
                raise TypeError(f"variable {index} must be real floating point, got {kind.name}")
        self.shapes: list[tuple[int, ...]] = [tuple(v.shape) for v in self.variables]
        wide = any(kind == tf.float64 for kind in kinds)
        self.dtype: np.dtype[Any] = np.dtype(np.float64 if wide else np.float32)

    def new_buffer(self) -> TensorFlowBuffer:
        """A flat buffer in host memory."""
        return TensorFlowBuffer(self)


class TensorFlowBuffer(HostBuffer):
    """All variables' entries in one flat array (numel,), with a view of it for each variable."""

    def __init__(self, model: TensorFlowModel) -> None:
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in model.shapes]
        super().__init__(np.zeros(sum(sizes), model.dtype))
        self._model = model
        parts = np.split(self.wire, np.cumsum(sizes)[:-1])
        self._views = [part.reshape(shape) for part, shape in zip(parts, model.shapes, strict=True)]

    def take_weights(self) -> None:
        """Copies the variables into the buffer."""
        for view, variable in zip(self._views, self._model.variables, strict=True):
            view[...] = tf.convert_to_tensor(variable).numpy()

    def take_gradients(self) -> None:
        """Copies the gradients handed to ``step`` into the buffer; zeros where there is none."""
        for view, gradient in zip(self._views, self._model.gradients, strict=True):
            if gradient is None:
                view[...] = 0.0
                continue
            dense = tf.convert_to_tensor(gradient)  # sums the slices of an embedding's gradient
            if tuple(dense.shape) != view.shape:
                raise ValueError(
                    f"gradient must have its variable's shape {view.shape}, got "
                    f"{tuple(dense.shape)}"
                )
            view[...] = dense.numpy()

    def put_weights(self) -> None:
        """Copies the buffer into the variables."""
        for view, variable in zip(self._views, self._model.variables, strict=True):
            variable.assign(tf.cast(view, tf.as_dtype(variable.dtype)))


class ParameterServer(Core):
    """Asynchronous SGD over MPI for a Keras model or variables, in place of an optimizer.

    ::

        ps = hvd.ParameterServer(model, lr=0.1, rule="dc-asgd-a")
        if ps.is_server:
            ps.serve()
        else:
            for x, y in batches(ps.worker, ps.workers):
                with tf.GradientTape() as tape:
                    value = loss(y, model(x))
                ps.step(tape.gradient(value, model.trainable_variables))
            ps.finish()

    The gradients may come out of a ``tf.function``; ``step`` itself runs eagerly.

    Args:
        model: a model with ``trainable_variables``, or a sequence of variables; on the same ranks
            the same one.
        settings: as of :class:`hvd_ext.async_ps.core.ParameterServer`.

    Raises:
        As :class:`hvd_ext.async_ps.core.ParameterServer`.
    """

    def __init__(self, model: Any, **settings: Any) -> None:
        self._model = TensorFlowModel(getattr(model, "trainable_variables", model))
        super().__init__(self._model, **settings)

    def step(self, gradients: Sequence[Any]) -> None:  # type: ignore[override]
        """Workers: push ``gradients``, one per variable, and pull the next weights.

        Raises:
            RuntimeError: called inside a ``tf.function``, or as in the base class.
            ValueError: their number or a shape differs from the variables'.
        """
        if not tf.executing_eagerly():
            raise RuntimeError(
                "step() must run eagerly; return the gradients from the tf.function and call "
                "step() outside of it"
            )
        if len(gradients) != len(self._model.variables):
            raise ValueError(
                f"gradients must be {len(self._model.variables)}, one per variable, got "
                f"{len(gradients)}"
            )
        self._model.gradients = gradients
        super().step()

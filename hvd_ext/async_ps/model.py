"""What the parameter server needs to know of a model; each front end has its own such class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class FlatBuffer(Protocol):
    """All parameters' entries in one flat buffer (n,), in the order of the parameters."""

    wire: Any
    """What MPI sends from and receives into, (n,): a NumPy array, or a device array with
    CUDA-aware MPI. Slices of it are views."""

    def take_weights(self) -> None:
        """Copies the model's weights into the buffer."""

    def take_gradients(self) -> None:
        """Copies the model's gradients into the buffer; zeros where there is none."""

    def put_weights(self) -> None:
        """Copies the buffer into the model's weights."""

    def max_magnitude(self) -> float:
        """The largest magnitude in the buffer; NaN if any entry is NaN."""

    def read_entries(self) -> Array:
        """The buffer's entries in host memory (n,); maybe a view."""

    def write_entries(self, entries: Array) -> None:
        """Overwrites the buffer with entries in host memory (n,)."""


class FlatModel(Protocol):
    """A model as parameters of fixed shapes that travel flat, all in one dtype."""

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Of the parameters, in their order."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """In which they travel, float32 or float64."""

    def new_buffer(self) -> FlatBuffer:
        """A new buffer of this model."""


class NumpyModel:
    """Parameters that are NumPy arrays, changed in place; gradients are handed over by the user.

    Args:
        parameters: float32 or float64 arrays; they travel as float64 if any of them is.

    Raises:
        TypeError: a parameter is neither float32 nor float64.
    """

    def __init__(self, parameters: Sequence[Array]) -> None:
        self.parameters = list(parameters)
        for index, array in enumerate(self.parameters):
            known = isinstance(array, np.ndarray) and array.dtype.type in (np.float32, np.float64)
            if not known:
                raise TypeError(
                    f"parameter {index} must be a float32 or float64 NumPy array, got "
                    f"{getattr(array, 'dtype', type(array).__name__)}"
                )
        self.shapes: list[tuple[int, ...]] = [array.shape for array in self.parameters]
        self.dtype = np.result_type(np.float32, *self.parameters)
        self.gradients: Sequence[Array | None] = [None] * len(self.parameters)

    def new_buffer(self) -> _NumpyBuffer:
        """A new buffer of these arrays."""
        return _NumpyBuffer(self)


class HostBuffer:
    """The part of a buffer in host memory that all front ends share."""

    def __init__(self, wire: Array) -> None:
        self.wire = wire

    def max_magnitude(self) -> float:
        """The largest magnitude in the buffer; NaN if any entry is NaN."""
        return float(max(self.wire.max(), -self.wire.min()))

    def read_entries(self) -> Array:
        """The buffer itself."""
        return self.wire

    def write_entries(self, entries: Array) -> None:
        """Overwrites the buffer."""
        self.wire[...] = entries


class _NumpyBuffer(HostBuffer):
    def __init__(self, model: NumpyModel) -> None:
        sizes = [array.size for array in model.parameters]
        super().__init__(np.zeros(sum(sizes), dtype=model.dtype))
        ends = np.cumsum(sizes)
        self._model = model
        self._views = [
            self.wire[end - size : end].reshape(array.shape)
            for array, size, end in zip(model.parameters, sizes, ends, strict=True)
        ]

    def take_weights(self) -> None:
        for view, array in zip(self._views, self._model.parameters, strict=True):
            view[...] = array

    def take_gradients(self) -> None:
        for view, gradient in zip(self._views, self._model.gradients, strict=True):
            if gradient is not None and np.shape(gradient) != view.shape:
                raise ValueError(
                    f"gradient must have its parameter's shape {view.shape}, got "
                    f"{np.shape(gradient)}"
                )
            view[...] = 0.0 if gradient is None else gradient

    def put_weights(self) -> None:
        for view, array in zip(self._views, self._model.parameters, strict=True):
            array[...] = view

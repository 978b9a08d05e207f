"""``ParameterServer`` for parameters that are NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvd_ext.async_ps.core import ParameterServer as Core
from hvd_ext.async_ps.model import Array, NumpyModel


class ParameterServer(Core):
    """Asynchronous SGD on NumPy arrays, which are changed in place.

    Args:
        parameters: float32 or float64 arrays.
        settings: as of :class:`hvd_ext.async_ps.core.ParameterServer`.
    """

    def __init__(self, parameters: Sequence[Array], **settings: Any) -> None:
        self._model = NumpyModel(parameters)
        super().__init__(self._model, **settings)

    def step(self, gradients: Sequence[Array | None]) -> None:  # type: ignore[override]
        """Workers: push ``gradients``, one per parameter, and pull the next weights in place.

        Raises:
            ValueError: their number or a shape differs from the parameters'.
        """
        if len(gradients) != len(self._model.parameters):
            raise ValueError(
                f"gradients must be {len(self._model.parameters)}, one per parameter, got "
                f"{len(gradients)}"
            )
        self._model.gradients = gradients
        super().step()

"""A model's parameters without a walk through its modules on every step."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import nn


class ParameterCache:
    """The parameters of a model, each once, found anew when a module or parameter was put in or taken out."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: list[nn.Parameter] = []
        self._tables: list[Mapping[str, Any]] = []
        self._held: list[Any] = []

    def current_parameters(self) -> list[nn.Parameter]:
        """What ``list(model.parameters())`` is."""
        held = [one for table in self._tables for one in table.values()]
        if not self._tables or len(held) != len(self._held) or not all(map(operator.is_, held, self._held)):
            self._found = list(self._model.parameters())
            self._tables = [table for module in self._model.modules()
                            for table in (module._parameters, module._modules)]
            self._held = [one for table in self._tables for one in table.values()]
        return self._found


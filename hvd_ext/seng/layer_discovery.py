"""What SENG finds in a model: layers that it holds curvature of, and what is left without, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hvd_ext.seng.coverage_report import UncoveredParameters
from hvd_ext.seng.settings import Settings

NO_RULE = "no rule"
SHARES = "shares a weight"
EXCLUDED = "in exclude="

Layer = TypeVar("Layer")


@dataclass
class Inventory(Generic[Layer]):
    """A model's layers, the modules that have trained weights and get no curvature, and the settings:
    those of the user, brought within ``memory``."""

    layers: list[Layer]
    missing: list[UncoveredParameters]
    settings: Settings

    @property
    def without_rule(self) -> list[str]:
        """Those that the user did not exclude, for a message."""
        return [one.text if one.cause == NO_RULE else f"{one.text[:-1]}, {one.cause})"
                for one in self.missing if one.cause != EXCLUDED]


def is_within(name: str, excluded: Iterable[str], separator: str) -> bool:
    """Whether a module, or one that holds it, is in ``exclude=``."""
    return any(name == one or name.startswith(f"{one}{separator}") for one in excluded)

"""What is on its way, or waits, between two steps of ``overlap=``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hvd_ext.torch.reducers.base import NamedParameter


class FrozenLossScale:
    """The loss scale that what is on its way carries, whatever it is by now."""

    def __init__(self, now: Callable[[], Any]) -> None:
        self.now = now
        self.held: float | None = None

    def __call__(self) -> float:
        return float(self.now()) if self.held is None else self.held


@dataclass(frozen=True)
class ReducedGradients:
    """What a step has sent, once it is reduced: the same on every rank.

    Attributes:
        good: whether it may be applied.
        gradients: by entry, ``scale`` times the reduced gradient; without those that were frozen.
        scale: the loss scale.
    """

    good: bool
    gradients: dict[NamedParameter, torch.Tensor]
    scale: float

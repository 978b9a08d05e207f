"""What is on its way, or waits, between two steps of ``overlap=``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hvd_ext.torch.reducers.base import NamedParameter, Reducer


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


class DelayedState:
    """What ``overlap=`` keeps beside the state of the reducer inside, the same on every rank.

    Attributes:
        updates: that were made with a delayed gradient.
        mean_square: by entry, of delayed gradients.
        before: by entry, the weights at which what waits was taken.
        arrived: what waits; None for nothing.
    """

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self.updates = 0
        self.mean_square: dict[NamedParameter, torch.Tensor] = {}
        self.before: dict[NamedParameter, torch.Tensor] = {}
        self.arrived: ReducedGradients | None = None

    def state_dict(self) -> dict[str, Any]:
        """A copy of all of it, by the parameters' names."""
        state: dict[str, Any] = {"updates": self.updates, "mean_square": _by_name(self.mean_square),
                                 "arrived": None}
        if self.arrived is not None:
            state["arrived"] = {"good": self.arrived.good, "scale": self.arrived.scale,
                                "gradients": _by_name(self.arrived.gradients),
                                "before": _by_name(self.before)}
        return state

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse the state of another model.

        Raises:
            ValueError: names or shapes differ.
        """
        arrived = state["arrived"] or {}
        for tensors in (state["mean_square"], *(arrived.get(key, {}) for key in ("gradients", "before"))):
            self._by_entry(tensors)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take back what :meth:`state_dict` gave; None: begin new."""
        self.before, self.mean_square, self.updates, self.arrived = {}, {}, 0, None
        if state is None:
            return
        self.updates = state["updates"]
        self.mean_square = self._by_entry(state["mean_square"])
        arrived = state["arrived"]
        if arrived is not None:
            self.arrived = ReducedGradients(arrived["good"], self._by_entry(arrived["gradients"]),
                                            arrived["scale"])
            self.before = self._by_entry(arrived["before"])

    def state_tensors(self) -> list[torch.Tensor]:
        """What is held between steps."""
        return [*self.mean_square.values(), *self.before.values()]

    def _by_entry(self, tensors: dict[str, torch.Tensor]) -> dict[NamedParameter, torch.Tensor]:
        entries = {entry.name: entry for entry in self._reducer.entries}
        wrong = sorted(name for name, tensor in tensors.items()
                       if name not in entries or entries[name].parameter.shape != tensor.shape)
        if wrong:
            raise ValueError(
                f"the checkpoint's late gradients do not fit this model: {', '.join(wrong[:4])} differ "
                f"({len(wrong)} in all). Use the model that it was saved with, or pass "
                "reset_per_rank_state=True to drop them")
        return {entries[name]: tensor.to(entries[name].parameter.device, copy=True)
                for name, tensor in tensors.items()}


def _by_name(tensors: dict[NamedParameter, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {entry.name: tensor.detach().clone() for entry, tensor in tensors.items()}

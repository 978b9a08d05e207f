"""The step: from reduced gradients to SENG's directions. Equations 26 to 28 and the three couplings.

p = (g - U b)/lam          (SENG eq. 8)   ``BatchedSolver.apply_directions``
b = (lam I + U^T U)^-1 U^T g    (eq. 9)   ``BatchedSolver.local_contributions``
U b = (1/M) sum_i U_i b_i      (eq. 26)   each rank its own ``b_i``, one allreduce per layer
the two means of eq. 28 in place of it, for ``uc="factored"``   ``Product.message``
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.seng.batched_solve import BatchedSolver
from hvd_ext.torch.seng.layer_curvature import LayerCurvature
from hvd_ext.torch.seng.layer_discovery import Layer

Started = dict[Layer, "Handle | torch.Tensor"]


@dataclass
class Step:
    """What a step works with: the ranks (None for one), the collectives' prefix, the form of U c."""

    collectives: Collectives | None
    name: str
    uc: str
    waited: float = 0.0

    def compute_directions(self, joint: BatchedSolver, lam: float) -> None:
        """"block" coupling, ``U = diag(U_i)`` (SENG eq. 26), and "full", one system of all ranks."""
        if self.collectives is None:
            joint.apply_single_rank(lam, self.uc)
            return
        started = {layer: self.start_mean(layer, message)
                   for layer, message in joint.local_contributions(lam, self.uc)}
        joint.apply_directions({layer: self.wait_mean(one) for layer, one in started.items()}, lam, self.uc)

    def lagged_directions(self, joint: BatchedSolver, lam: float, lagged: Lagged,
                          lam_next: float | None) -> Lagged:
        """"lagged" coupling: ``U b`` of the gradient of the step before (SENG eq. 27).

        Layers that have no such gradient yet take this step's, as "block" does.

        Args:
            lagged: what the step before left; its messages are waited for.
            lam_next: the damping of the next step; None when that one refreshes the curvature, so
                that its message can be made only then.

        Returns:
            What this step leaves for the next one.
        """
        started = dict(lagged.pending)
        if any(layer not in started for layer in joint.systems):
            for layer, message in joint.local_contributions(lam, self.uc):
                if layer not in started:
                    started[layer] = self.start_mean(layer, message)
        after = Lagged()
        following: dict[Layer, torch.Tensor] = {}
        if lam_next is None:
            after.previous = joint.copy_gradients()
        else:
            following.update(joint.local_contributions(lam_next, self.uc))
        means = {layer: self.wait_mean(started[layer]) for layer in joint.systems}
        lagged.pending.update({layer: mean for layer, mean in means.items() if layer in lagged.pending})
        joint.apply_directions(means, lam, self.uc)
        for layer, message in following.items():
            # Under way from here on, during the next forward and backward pass.
            after.pending[layer] = self.start_mean(layer, message)
        return after

    def start_mean(self, layer: Layer, message: torch.Tensor) -> Handle | torch.Tensor:
        """Start the mean of the ranks' messages for a layer."""
        if self.collectives is None:
            return message
        return self.collectives.allreduce_async_(message, f"{self.name}.uc/{layer.name}",
                                                 kind="curvature")

    def wait_mean(self, started: Handle | torch.Tensor) -> torch.Tensor:
        """The mean that was started."""
        if isinstance(started, torch.Tensor):
            return started
        begin = time.perf_counter()
        message = started.wait()
        self.waited += time.perf_counter() - begin
        return message


@dataclass
class Lagged:
    """What "lagged" coupling carries from one step to the next: of each layer either, or neither.

    ``pending``: the mean of the messages for the last gradient, perhaps under way. ``previous``: the
    last gradient itself, flat per parameter, when the next step's curvature is needed first.
    """

    pending: Started = field(default_factory=dict)
    previous: dict[Layer, list[torch.Tensor]] = field(default_factory=dict)

    def with_curvature(self, systems: Mapping[Layer, LayerCurvature], step: Step,
                       lam: float) -> Lagged:
        """The same with the messages of ``previous`` under way, made with a refresh's curvature."""
        joint = BatchedSolver({layer: systems[layer] for layer in self.previous if layer in systems})
        joint.set_gradients(self.previous)
        return Lagged({layer: step.start_mean(layer, message)
                       for layer, message in joint.local_contributions(lam, step.uc)})

    def wait_messages(self, step: Step) -> None:
        """Wait for all messages: they must have been received before they are dropped or saved."""
        self.pending = {layer: step.wait_mean(started) for layer, started in self.pending.items()}

    def part_names(self) -> list[str]:
        """What ranks compare: which parts there are."""
        return [name for name in ("pending", "previous") if getattr(self, name)]

    def lagged_state(self) -> dict[str, Any]:
        """For a checkpoint, after :meth:`wait_messages`."""
        return {"pending": {layer.name: message for layer, message in self.pending.items()} or None,
                "previous": {layer.name: list(flat) for layer, flat in self.previous.items()} or None}

    @classmethod
    def from_state(cls, saved: Mapping[str, Any], layers: Mapping[str, Layer]) -> Lagged:
        """What :meth:`lagged_state` gave, on the layers' devices."""
        def device(name: str) -> torch.device:
            return layers[name].parameters[0].device

        return cls({layers[name]: message.to(device(name))
                    for name, message in (saved["pending"] or {}).items()},
                   {layers[name]: [flat.to(device(name)) for flat in parts]
                    for name, parts in (saved["previous"] or {}).items()})

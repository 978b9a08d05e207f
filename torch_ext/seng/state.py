"""What SENG keeps between steps, as one object that saves, loads and reports itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hvd_ext.seng import CurvatureReport, Settings, layer_row, make_report
from hvd_ext.seng.coverage_report import UncoveredParameters
from hvd_ext.seng.sample_axes import Placement, describe_placement
from hvd_ext.torch.seng.capture import RuleStatus
from hvd_ext.torch.seng.layer_curvature import LayerCurvature
from hvd_ext.torch.seng.layer_discovery import Layer
from hvd_ext.torch.seng.step import Lagged

FORMAT = 2
BINDING = ("coupling", "uc", "explicit_threshold", "sketch", "sketch_size", "replacement", "rank",
           "row_sketch", "seed")  # settings that the saved tensors depend on


@dataclass
class State:
    """Counters, the layers' curvature, and what "lagged" coupling carries over.

    ``due``: the coming step refreshes the curvature.
    """

    step: int = 0
    due: bool = True
    skipped: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    systems: dict[Layer, LayerCurvature] = field(default_factory=dict)
    lagged: Lagged = field(default_factory=Lagged)

    def to_dict(self, settings: Settings, ranks: int) -> dict[str, Any]:
        """The state as plain containers and tensors; nothing may be under way."""
        return {
            "format": FORMAT, "ranks": ranks, "step": self.step, "due": self.due,
            "skipped": self.skipped, "failures": dict(self.failures),
            "settings": {name: getattr(settings, name) for name in BINDING},
            "layers": {layer.name: system.system_state() for layer, system in self.systems.items()},
            **self.lagged.lagged_state(),
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any], layers: Sequence[Layer], settings: Settings,
                  ranks: int) -> State:
        """What :meth:`to_dict` gave.

        Raises:
            ValueError: another format, model, settings or number of ranks.
        """
        if saved.get("format") not in (1, FORMAT):
            raise ValueError(f"SENG's state has format {saved.get('format')!r}, not {FORMAT}; it was "
                             "saved by another version: call reset_state() instead")
        if saved["ranks"] != ranks:
            raise ValueError(f"SENG's state was saved by {saved['ranks']} ranks and there are "
                             f"{ranks} now; call reset_state() to start its curvature anew")
        mine = {name: getattr(settings, name) for name in BINDING}
        odd = sorted(name for name in mine if saved["settings"].get(name) != mine[name])
        if odd:
            raise ValueError(
                f"SENG's state was saved with other settings: {odd[0]} was "
                f"{saved['settings'].get(odd[0])!r} and is {mine[odd[0]]!r}; construct SENG as it was, "
                "or call reset_state()")
        names = {layer.name: layer for layer in layers}
        unknown = sorted(set(saved["layers"]) - set(names))
        if unknown:
            raise ValueError(f"SENG's state has a layer {unknown[0]!r} that this model does not have; "
                             "load it into the model it was saved with, or call reset_state()")
        systems = {}
        for layer in layers:
            if layer.name in saved["layers"]:
                one = saved["layers"][layer.name]
                one = one if saved["format"] == FORMAT else _from_format_1(one)
                systems[layer] = LayerCurvature.from_state(one, layer.parameters[0].device)
        return cls(int(saved["step"]), bool(saved["due"]), int(saved["skipped"]),
                   dict(saved["failures"]), systems, Lagged.from_state(saved, names))

    def report(self, layers: Sequence[Layer], settings: Settings, parameters: Sequence[torch.Tensor], *,
               ranks: int, waited: float, trust: RuleStatus, missing: Sequence[UncoveredParameters],
               samples: Mapping[nn.Module, Placement]) -> CurvatureReport:
        """Data of every layer, see :data:`hvd_ext.seng.report.COLUMNS`, and totals."""
        rows = []
        for layer in layers:
            held = self.systems[layer].layer_stats(self.step) if layer in self.systems else None
            row = layer_row(layer.shape, layer.plan, held, failures=self.failures.get(layer.name, 0))
            where = {describe_placement(samples[module]) for module in layer.slots if module in samples}
            rows.append({**row, "samples": " / ".join(sorted(where)) or None,
                         "refused": trust.refused.get(layer)})
        owned = {id(p) for layer in self.systems for p in layer.parameters}
        trainable = [p for p in parameters if p.requires_grad]
        rest = sum(p.numel() for p in trainable if id(p) not in owned)
        gaps = [*missing, *(UncoveredParameters(layer.name, layer.registered.kind, reason,
                                                sum(p.numel() for p in layer.parameters))
                            for layer, reason in trust.refused.items())]
        return make_report(rows, settings, step=self.step, ranks=ranks, skipped=self.skipped,
                           identity_parameters=rest, parameters=sum(p.numel() for p in trainable),
                           gaps=gaps, seconds_waited=waited)


def _from_format_1(saved: dict[str, Any]) -> dict[str, Any]:
    """Format 1 kept factors as (groups, n, r rho), and of explicit blocks not where their rows are."""
    samples = {"g": saved["rho"], "a": saved["rho"], "xg": saved["total"], "xa": saved["total"]}
    blocks = [{name: value.unflatten(2, (-1, samples[name])) if name in samples else value
               for name, value in block.items()} for block in saved["blocks"]]
    explicit = [block for block in blocks if block["type"] == "Explicit"]
    start, height = 0, sum(block["u"].shape[1] for block in explicit)
    for block in explicit:
        block.update(start=start, height=height)
        start += block["u"].shape[1]
    return {**saved, "blocks": blocks}

"""A refresh of the curvature: sketch, small systems, and what ranks must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from hvd_ext.agreement import digest
from hvd_ext.seng import Settings, generator, sample_rows
from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.seng import kernels
from hvd_ext.torch.seng.blocks import Block, Curvature, Explicit
from hvd_ext.torch.seng.build import Chooser, row_scores, sketch
from hvd_ext.torch.seng.capture import working_dtype
from hvd_ext.torch.seng.inventory import Layer


@dataclass
class Refreshed:
    """New curvature of the layers that have one on every rank, and why others have none."""

    step: int
    curvatures: dict[Layer, Curvature] = field(default_factory=dict)
    failures: dict[Layer, str] = field(default_factory=dict)


class Refresh:
    """Turns what a rank captured into curvature that all ranks use alike.

    Args:
        collectives: of M ranks; None on a single one.
        name: prefix of the collectives' names.
    """

    def __init__(self, layers: Sequence[Layer], settings: Settings,
                 collectives: Collectives | None, name: str) -> None:
        self._layers = list(layers)
        self._settings = settings
        self._collectives = collectives
        self._name = name
        described = {key: value for key, value in vars(settings).items() if key != "damping"}
        shapes = [(layer.shape, layer.plan) for layer in self._layers]
        self._digest = digest(sorted(described.items()), shapes)

    def same_state(self, step: int, due: bool, kept: Sequence[str]) -> bool:
        """Whether all ranks are at the same step with the same things kept (``kept`` names them).

        Every rank calls it at its first step, and after a state was loaded or reset.

        Raises:
            RuntimeError: on every rank, when they differ and not all are about to refresh, so that
                they would wait for different collectives.
        """
        if self._collectives is None:
            return True
        mine = torch.tensor([[step, int(due), digest(sorted(kept))]])
        everyone = self._collectives.allgather_async(
            mine, f"{self._name}.state", kind="curvature").wait()
        if bool((everyone == everyone[0]).all()):
            return True
        if not bool(everyone[:, 1].all()):
            raise RuntimeError(
                f"SENG's state differs between ranks: they are at the steps "
                f"{everyone[:, 0].tolist()} (by rank); load every rank's own state, or call "
                "reset_state() on all of them")
        return False

    def run(self, captured: dict[Layer, Curvature | str], step: int, lam: float) -> Refreshed:
        """Sketch, factor and agree. Every rank calls it at the same step.

        Raises:
            RuntimeError: on every rank, when the ranks have different layers or settings.
        """
        result = Refreshed(step)
        mine: dict[Layer, Curvature] = {}
        for layer in self._layers:
            curvature = captured.get(layer, "it was not used in the forward and backward pass")
            if isinstance(curvature, str):
                result.failures[layer] = curvature
            else:
                mine[layer] = curvature
        if self._collectives is not None and self._settings.coupling == "full":
            self._agree(mine, result)
            for curvature in mine.values():
                curvature.step = result.step
            self._join(mine, self._collectives)
            self._systems(mine, lam, result)
            self._agree(mine, result)
        else:
            for layer in mine:
                sketch(mine[layer], layer.plan, self._chooser(layer, mine[layer]))
            self._systems(mine, lam, result)
            self._agree(mine, result)
        for curvature in mine.values():
            curvature.step = result.step
        result.curvatures = mine
        return result

    def _systems(self, mine: dict[Layer, Curvature], lam: float, result: Refreshed) -> None:
        for layer in list(mine):
            mine[layer].system()
            if not mine[layer].factor(lam):
                result.failures[layer] = "its small system could not be factored"
                del mine[layer]

    def _agree(self, mine: dict[Layer, Curvature], result: Refreshed) -> None:
        """Keep the layers that every rank has; make the columns of factors as many on all."""
        if self._collectives is None:
            return
        rows = [[int(layer in mine), mine[layer].r if layer in mine else 0]
                for layer in self._layers]
        header = torch.tensor([[self._digest, result.step, *np.ravel(rows).tolist()]])
        everyone = self._collectives.allgather_async(
            header, f"{self._name}.refresh", kind="curvature").wait()
        if bool((everyone[:, 0] != everyone[0, 0]).any()):
            odd = [rank for rank, one in enumerate(everyone[:, 0].tolist())
                   if one != everyone[0, 0]]
            raise RuntimeError(
                f"SENG has other layers or settings on rank {odd[0]} than on rank 0 (and on "
                f"{len(odd)} ranks in all); construct the same model with the same arguments of "
                "SENG on every rank"
            )
        result.step = int(everyone[:, 1].max())
        table = everyone[:, 2:].view(everyone.shape[0], -1, 2)
        for k, layer in enumerate(self._layers):
            lacking = (table[:, k, 0] == 0).nonzero().flatten().tolist()
            if lacking:
                result.failures.setdefault(layer, f"rank {lacking[0]} could not take it")
                mine.pop(layer, None)
            elif layer.plan.implicit:
                _pad(mine[layer], int(table[:, k, 1].max()))

    def _join(self, mine: dict[Layer, Curvature], collectives: Collectives) -> None:
        """Sketch with the same rows on all ranks and gather every rank's Xi."""
        labels = {layer: _sampled(layer) for layer in mine}
        reduced: dict[tuple[Layer, str], Handle] = {}
        if self._settings.sketch == "leverage":
            for layer, names in labels.items():
                for label in names:
                    reduced[layer, label] = collectives.allreduce_async_(
                        row_scores(mine[layer], label),
                        f"{self._name}.scores/{layer.name}/{label}", kind="curvature")
        scores = {key: handle.wait() for key, handle in reduced.items()}
        gathered: list[tuple[Block, str, torch.dtype, Handle]] = []
        counts: dict[Layer, Handle] = {}
        for layer, curvature in mine.items():
            own = {label: scores[layer, label] for label in labels[layer]
                   if (layer, label) in scores}
            sketch(curvature, layer.plan, self._chooser(layer, curvature, own))
            counts[layer] = collectives.allgather_async(
                torch.tensor([curvature.rho]), f"{self._name}.rho/{layer.name}", kind="curvature")
            for number, block in enumerate(curvature.blocks):
                parts = ("xi",) if isinstance(block, Explicit) else ("xg", "xa")
                for part in parts:
                    tensor = getattr(block, part)
                    sent = _to_rows(tensor, curvature.rho)
                    # bfloat16 travels as the bits it is: a gather does no arithmetic.
                    half = sent.dtype == torch.bfloat16
                    handle = collectives.allgather_async(
                        sent.view(torch.int16) if half else sent,
                        f"{self._name}.{part}/{layer.name}/{number}", kind="curvature")
                    gathered.append((block, part, tensor.dtype, handle))
        for layer, handle in counts.items():
            each = handle.wait().tolist()
            curvature = mine[layer]
            curvature.offset = sum(each[:collectives.rank])
            curvature.total = sum(each)
            curvature.ranks = len(each)
        for block, part, dtype, handle in gathered:
            joined = handle.wait()
            joined = joined.view(dtype) if joined.dtype != dtype else joined
            setattr(block, part, _from_rows(joined))

    def _chooser(self, layer: Layer, curvature: Curvature,
                 scores: dict[str, torch.Tensor] | None = None) -> Chooser:
        device = layer.parameters[0].device
        dtype = working_dtype(layer)

        def choose(label: str, n: int, q: int) -> tuple[torch.Tensor, torch.Tensor]:
            known = None
            if self._settings.sketch == "leverage":
                given = (scores or {}).get(label)
                known = row_scores(curvature, label) if given is None else given
            rows, weights = sample_rows(
                n, q, generator(self._settings.seed, curvature.step, f"{layer.name}/{label}"),
                scores=None if known is None else known.double().cpu().numpy(),
                replacement=self._settings.replacement,
            )
            return (torch.as_tensor(rows, device=device),
                    torch.as_tensor(weights, device=device, dtype=dtype))

        return choose


def _sampled(layer: Layer) -> list[str]:
    plan = layer.plan
    wanted = {"rows": plan.sketch, "rows_g": plan.rows_g, "rows_a": plan.rows_a}
    return [label for label, count in wanted.items() if count is not None]


def _pad(curvature: Curvature, r: int) -> None:
    for block in curvature.blocks:
        if not isinstance(block, Explicit):
            for part in ("g", "a", "xg", "xa"):
                setattr(block, part, kernels.pad_columns(getattr(block, part), curvature.rho, r))
            curvature.r = r


def _to_rows(tensor: torch.Tensor, rho: int) -> torch.Tensor:
    """Samples first: Xi (rho, q) as it is, (groups, zeta, r rho) as (rho, r, groups, zeta)."""
    if tensor.dim() == 2:
        return tensor.contiguous()
    return tensor.view(*tensor.shape[:2], -1, rho).permute(3, 2, 0, 1).contiguous()


def _from_rows(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 2:
        return tensor
    return tensor.permute(2, 3, 1, 0).flatten(2).contiguous()

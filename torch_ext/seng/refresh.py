"""A refresh of the curvature: sketch, small systems, and what ranks must agree on."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from hvd_ext.consistency.fingerprint import Fingerprint, digest_parts
from hvd_ext.seng import (
    Settings,
    check_same_layers,
    layers_fingerprint,
    sample_rows,
    seeded_generator,
    states_differ,
    strict_refusal,
    usable_scores,
)
from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.seng.batched_solve import BatchedSolver
from hvd_ext.torch.seng.blocks import Block, Chooser
from hvd_ext.torch.seng.capture import CaptureResult, RuleStatus
from hvd_ext.torch.seng.layer_curvature import LayerCurvature
from hvd_ext.torch.seng.layer_discovery import Layer

HEADER = 3  # fingerprint, step, damping


@dataclass
class Refreshed:
    """New curvature of the layers that have one on every rank, and why others have none.

    ``joint`` has ``systems`` in units, unless some that were formed are not among them, or were changed.
    ``trust`` is what the gradient check of any rank says from here on; ``by_rows`` are the layers of
    which a rank could not tell the samples apart.
    """

    step: int
    systems: dict[Layer, LayerCurvature] = field(default_factory=dict)
    failures: dict[Layer, str] = field(default_factory=dict)
    trust: RuleStatus = field(default_factory=RuleStatus)
    by_rows: list[Layer] = field(default_factory=list)
    joint: BatchedSolver | None = None


class Refresh:
    """Turns what a rank captured into curvature that is the same set of layers on all ranks.

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

    @functools.cached_property
    def _fingerprint(self) -> Fingerprint:
        return layers_fingerprint(
            self._settings, [(layer.name, layer.shape, layer.plan) for layer in self._layers])

    def same_state(self, step: int, due: bool, kept: Sequence[str]) -> bool:
        """Whether all ranks are at the same step with the same things kept (``kept`` names them).

        Every rank calls it at its first step, and after a state was loaded or reset.

        Raises:
            RuntimeError: on every rank, when they differ and not all are about to refresh, so that
                they would wait for different collectives.
        """
        if self._collectives is None:
            return True
        mine = torch.tensor([[step, int(due), digest_parts(sorted(kept))]])
        everyone = self._collectives.allgather_async(
            mine, f"{self._name}.state", kind="curvature").wait()
        if bool((everyone == everyone[0]).all()):
            return True
        if not bool(everyone[:, 1].all()):
            raise states_differ(everyone[:, 0].tolist())
        return False

    def refresh_curvature(self, captured: CaptureResult, refused: Mapping[Layer, str],
                          by_rows: Sequence[Layer], step: int,
                          lam: float) -> Refreshed:
        """Sketch, factor and agree. Every rank calls it at the same step.

        Args:
            refused: layers that an earlier refresh refused.
            by_rows: layers of which this rank cannot tell the samples apart.

        Raises:
            RuntimeError: on every rank, when the ranks have different layers, settings or damping.
            ValueError: on every rank, when ``strict`` and some rank has layers in ``by_rows``.
        """
        result = Refreshed(step, by_rows=list(by_rows), trust=RuleStatus(
            dict(captured.trust.accepted), {**refused, **captured.trust.refused}))
        for layer in self._layers:
            if layer in result.trust.refused:
                continue
            found = captured.found.get(layer, "it was not used in the forward and backward pass")
            if isinstance(found, str):
                result.failures[layer] = found
            else:
                result.systems[layer] = found
        if self._collectives is not None and self._settings.coupling == "full":
            self._agree_on_layers(result, lam)
            lam = self._settings.damping_at(result.step)  # a rank that has joined was at another step
            self._join_systems(result.systems, result.step, self._collectives)
        else:
            self._sketch_systems(result.systems, step)
        joint = result.joint = BatchedSolver(result.systems)
        joint.form_gram()
        for layer in joint.factor_systems(lam):
            result.failures[layer] = "its small system could not be factored"
            del result.systems[layer]
        self._agree_on_layers(result, lam)
        if self._settings.strict and result.by_rows:
            raise ValueError(strict_refusal([layer.name for layer in result.by_rows]))
        return result

    def resample_rows(self, systems: Mapping[Layer, LayerCurvature], step: int,
                      lam: float) -> dict[Layer, LayerCurvature]:
        """Other sampled rows for curvature that is older than this step (SENG Algorithm 1). Every rank
        calls it at the same step. A layer whose new small system has no factor keeps its old rows.
        """
        drawn = {layer: system.without_sketch() for layer, system in systems.items()
                 if layer.plan.sampled and system.step != step}
        if self._collectives is not None and self._settings.coupling == "full":
            self._join_systems(drawn, step, self._collectives)
        else:
            self._sketch_systems(drawn, step)
        joint = BatchedSolver(drawn)
        joint.form_gram()
        for layer in joint.factor_systems(lam):
            del drawn[layer]
        return {**systems, **drawn}

    def _sketch_systems(self, systems: Mapping[Layer, LayerCurvature], step: int) -> None:
        for layer, system in systems.items():
            if layer.plan.sampled:
                system.sample_rows(layer.plan, self._make_chooser(layer, system, step))

    def _agree_on_layers(self, result: Refreshed, lam: float) -> None:
        """Keep the layers that every rank has; give factors as many columns as any rank's have."""
        if self._collectives is None:
            return
        result.joint = None
        rows = [[int(layer in result.systems), result.systems[layer].r if layer in result.systems
                 else 0, int(layer in result.trust.refused), int(layer in result.by_rows)]
                for layer in self._layers]
        bits = int(np.float64(lam).view(np.int64))
        header = [self._fingerprint.number, result.step, bits, *np.ravel(rows).tolist()]
        # Flat, as ranks with other layers send headers of another length.
        gathered = self._collectives.allgather_async(
            torch.tensor(header), f"{self._name}.refresh", kind="curvature").wait()
        everyone = self._compare_headers(gathered, len(header))
        result.step = int(everyone[:, 1].max())
        table = everyone[:, HEADER:].view(everyone.shape[0], -1, 4)
        result.by_rows = [layer for k, layer in enumerate(self._layers) if bool(table[:, k, 3].any())]
        for k, layer in enumerate(self._layers):
            refusing = table[:, k, 2].nonzero().flatten().tolist()
            if refusing:
                result.trust.refused.setdefault(layer, f"rank {refusing[0]} refused it: see its warnings")
                result.trust.accepted.pop(layer, None)
                result.failures.pop(layer, None)
                result.systems.pop(layer, None)
                continue
            lacking = (table[:, k, 0] == 0).nonzero().flatten().tolist()
            if lacking:
                result.failures.setdefault(layer, f"rank {lacking[0]} could not take it")
                result.systems.pop(layer, None)
            else:
                result.systems[layer].pad_columns(int(table[:, k, 1].max()))
        for system in result.systems.values():
            system.step = result.step

    def _compare_headers(self, gathered: torch.Tensor, length: int) -> torch.Tensor:
        """The ranks' headers (M, length); an error on every rank when what they must share differs."""
        assert self._collectives is not None
        ranks = self._collectives.size
        everyone = gathered.view(ranks, -1) if gathered.numel() == ranks * length else None
        if everyone is None or bool((everyone[:, 0] != everyone[0, 0]).any()):
            check_same_layers(self._collectives.allgather_object(
                self._fingerprint.lines, f"{self._name}.disagreement"))
        # A rank that has joined is at step 0 still; only the others must have the same damping.
        at_step = everyone[:, 1] == everyone[:, 1].max()
        if bool((everyone[at_step, 2] != everyone[at_step, 2][0]).any()):
            dampings = everyone[:, 2].numpy().view(np.float64).tolist()
            raise RuntimeError(f"SENG's damping differs between ranks: {dampings} (by rank); pass the "
                               "same damping= everywhere, or a function of the step alone")
        return everyone

    def _join_systems(self, systems: Mapping[Layer, LayerCurvature], step: int,
                      collectives: Collectives) -> None:
        """Sketch with the same rows on all ranks and gather every rank's Xi (full coupling)."""
        reduced: dict[tuple[Layer, str], Handle] = {}
        if self._settings.sketch == "leverage":
            for layer, system in systems.items():
                for label in layer.plan.sampled:
                    reduced[layer, label] = collectives.allreduce_async_(
                        system.row_scores(label), f"{self._name}.scores/{layer.name}/{label}",
                        kind="curvature")
        scores = {key: handle.wait() for key, handle in reduced.items()}
        gathered: list[tuple[Block, str, Handle]] = []
        counts: dict[LayerCurvature, Handle] = {}
        for layer, system in systems.items():
            own = {label: scores[layer, label] for label in layer.plan.sampled
                   if (layer, label) in scores}
            system.sample_rows(layer.plan, self._make_chooser(layer, system, step, own))
            counts[system] = collectives.allgather_async(
                torch.tensor([system.rho]), f"{self._name}.rho/{layer.name}", kind="curvature")
            for number, block in enumerate(system.blocks):
                for part, xi in block.sketches_by_name().items():
                    gathered.append((block, part, collectives.allgather_async(
                        xi, f"{self._name}.{part}/{layer.name}/{number}", kind="curvature")))
        for system, handle in counts.items():
            system.set_ranks(handle.wait().tolist(), collectives.rank)
        for block, part, handle in gathered:
            block.set_gathered(part, handle.wait())

    def _make_chooser(self, layer: Layer, system: LayerCurvature, step: int,
                      scores: dict[str, torch.Tensor] | None = None) -> Chooser:
        device = layer.parameters[0].device

        def choose(label: str, n: int, q: int) -> tuple[torch.Tensor, torch.Tensor]:
            known = None
            if self._settings.sketch == "leverage":
                known = system.row_scores(label) if scores is None else scores[label]
            rows, weights = sample_rows(
                n, q, seeded_generator(self._settings.seed, step, f"{layer.name}/{label}"),
                scores=None if known is None else usable_scores(known.double().cpu().numpy()),
                replacement=self._settings.replacement,
            )
            return (torch.as_tensor(rows, device=device),
                    torch.as_tensor(weights, device=device, dtype=layer.dtype))

        return choose

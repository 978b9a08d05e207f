"""Small linear layers with one row a sample: their curvature is built together, at the end of a pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hvd_ext.seng import Settings
from hvd_ext.torch.seng.blocks import FactoredBlock
from hvd_ext.torch.seng.layer_curvature import NOT_FINITE, LayerCurvature
from hvd_ext.torch.seng.layer_discovery import Layer
from hvd_ext.torch.seng.packed_layers import PackLayoutCache, fits_pack
from hvd_ext.torch.seng.rules import is_linear
from hvd_ext.torch.seng.sample_axes import Choose


@dataclass
class DeferredCapture:
    """What was captured of one: ``x`` (batch, n_A) and ``gz`` (batch, n_G)."""

    x: torch.Tensor
    gz: torch.Tensor


def can_defer(layer: Layer, settings: Settings) -> bool:
    """Whether a layer's curvature can be built together with others', as far as is known of it."""
    stored = settings.curvature_dtype
    return (fits_pack(layer) and is_linear(layer.registered) and not layer.tried and len(layer.slots) == 1
            and all(p.dtype == layer.dtype for p in layer.parameters)
            and (stored is None or getattr(torch, stored) == layer.dtype))


def build_deferred(captured: Mapping[Layer, DeferredCapture], frames: PackLayoutCache, choose: Choose,
                   scale_of: Callable[[int, int], float], step: int) -> dict[Layer, LayerCurvature | str]:
    """Each layer's unsketched curvature, or what is wrong with what was captured.

    The numbers are those that ``system.take`` gives for a layer by itself.

    Args:
        choose: which of so many samples are kept; None for all.
        scale_of: the factor of gz for so many samples of which so many are kept.
    """
    found: dict[Layer, LayerCurvature | str] = {}
    alike: dict[tuple[int, torch.device, torch.dtype], list[Layer]] = {}
    for layer, one in captured.items():
        alike.setdefault((one.x.shape[0], one.x.device, one.x.dtype), []).append(layer)
    for (batch, device, dtype), layers in alike.items():
        chosen = choose(batch, device)
        rho = batch if chosen is None else chosen.numel()
        frame = frames.layout_for(layers, rho, device, dtype)
        one = torch.ones((), device=device, dtype=dtype).expand(rho, 1)
        gz, x = [], []
        for layer in frame.layers:
            # Rows first: fewer are moved.
            gz.append(keep_chosen(captured[layer].gz, chosen))
            x += [keep_chosen(captured[layer].x, chosen), *([one] * (len(layer.parameters) - 1))]
        g = torch.cat(gz, 1).mul_(scale_of(batch, rho)).t().contiguous()
        a = torch.cat(x, 1).t().contiguous()
        # What is not finite stays so in a sum; finite numbers may overflow, then each layer is looked at.
        suspect = not bool(torch.isfinite(g.sum() + a.sum()))
        for layer, own_g, own_a in zip(frame.layers, frame.split_g(g), frame.split_a(a), strict=True):
            if suspect and not bool(own_g.isfinite().all() & own_a.isfinite().all()):
                found[layer] = NOT_FINITE
                continue
            block = FactoredBlock(tuple(range(len(layer.parameters))), layer.groups[2], own_g, own_a, own_g,
                                  own_a)
            found[layer] = LayerCurvature([block], rho, 1, 1, step)
    return found


def keep_chosen(rows: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    """The rows of samples that are kept."""
    return rows if chosen is None else rows.index_select(0, chosen)

"""The projections inside ``nn.MultiheadAttention``, which no module's ``forward`` of their own computes.

While the module runs on a refresh step, ``F.linear`` also tells what it was given and what it returned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from hvd_ext.torch.seng.functional_hooks import patch_function
from hvd_ext.torch.seng.rules import Factors, PerSample, Pick, Registered, Rule, rule_for

Arrange = Callable[[torch.Tensor], torch.Tensor]
Tell = Callable[[nn.Module, torch.Tensor, torch.Tensor, Rule, Arrange], None]
"""``tell(module, x, z, rule, arrange)``: a projection of ``module`` made z of x; ``arrange`` brings what
attention takes for its batch to the front of either."""


def attention_rule(module: nn.MultiheadAttention) -> Registered:
    """What SENG must know of the projections of query, key and value."""
    if module.in_proj_weight is not None:
        return PACKED
    return SEPARATE


def hook_projections(module: nn.MultiheadAttention, tell: Tell) -> Callable[[], None]:
    """Tell of every projection from here on until the function that is returned is called."""
    batch: list[int] = []  # N of (L, N, E), as the inner projections see it

    def listener(x: torch.Tensor, weight: torch.Tensor, _bias: torch.Tensor | None, z: torch.Tensor) -> None:
        _match_projection(module, x, weight, z, tell, batch)

    return patch_function("linear", listener)


def _match_projection(module: nn.MultiheadAttention, x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor,
                      tell: Tell, batch: list[int]) -> None:
    packed, width = module.in_proj_weight, module.embed_dim
    if weight is module.out_proj.weight:
        registered, _ = rule_for(module.out_proj)
        if registered is not None and batch:
            tell(module.out_proj, x, z, registered.rule,
                 lambda t: t.view(-1, batch[0], t.shape[-1]).transpose(0, 1))
    elif packed is not None and (weight is packed or weight._base is packed):
        first = weight.storage_offset() - packed.storage_offset()
        batch[:] = [x.shape[1]]
        tell(module, x, z, partial(_packed_rule, first=first // (width * width)), _batch_first)
    else:
        for part in ("q", "k", "v"):
            if weight is getattr(module, f"{part}_proj_weight"):
                batch[:] = [x.shape[1]]
                tell(module, x, z, partial(_separate_rule, part=part), _batch_first)


def _batch_first(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(0, 1)


def _packed_rule(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Pick, *, first: int) -> Factors:
    """Groups 0, 1, 2 are query, key, value; this use has those from ``first`` on."""
    x, gz = pick(x), pick(gz)
    width = int(module.embed_dim)  # type: ignore[arg-type]
    own = gz.shape[-1] // width
    g = gz.new_zeros((gz.shape[0], 3, gz[0, ..., 0].numel(), width))
    g[:, first:first + own] = gz.reshape(gz.shape[0], -1, own, width).transpose(1, 2)
    a = x.reshape(x.shape[0], 1, -1, width).expand(-1, 3, -1, -1)
    return Factors(g, a)


def _separate_rule(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Pick, *, part: str
                   ) -> PerSample:
    x, gz = (pick(t) for t in (x, gz))
    x, gz = (t.reshape(t.shape[0], -1, t.shape[-1]) for t in (x, gz))
    found = {f"{part}_proj_weight": torch.matmul(gz.mT, x)}
    if module.in_proj_bias is not None:
        width, start = gz.shape[-1], "qkv".index(part)
        bias = gz.new_zeros((gz.shape[0], 3, width))
        bias[:, start] = gz.sum(1)
        found["in_proj_bias"] = bias.flatten(1)
    return found


def _refuse_rule(module: nn.Module, x: Any, gz: torch.Tensor, pick: Pick) -> PerSample:
    raise ValueError("its projections were not seen")


def _packed_shape(module: nn.Module) -> tuple[int, int, int]:
    width = int(module.embed_dim)  # type: ignore[arg-type]
    return 3, width, width


PACKED = Registered("MultiheadAttention", _refuse_rule, _packed_shape,
                    names=(("weight", "in_proj_weight"), ("bias", "in_proj_bias")))
SEPARATE = Registered("MultiheadAttention", _refuse_rule,
                      names=tuple((name, name) for name in (
                          "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")))

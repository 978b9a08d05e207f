"""Per-sample gradients by looping autograd over samples: the oracle of what SENG captures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def by_masking(model: nn.Module, module: nn.Module, loss_of: Callable[[Any], torch.Tensor],
               x: torch.Tensor, factor: float) -> dict[str, torch.Tensor]:
    """Each sample's share of ``module``'s gradient: the loss gradient of its output with all other
    samples' rows zeroed, times ``factor``. Batch statistics count as given."""
    outputs: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda m, i, o: outputs.append(o))
    loss = loss_of(model(x))
    handle.remove()
    (z,) = outputs
    (gz,) = torch.autograd.grad(loss, z, retain_graph=True)
    named = {name: p for name, p in module._parameters.items() if p is not None and p.requires_grad}
    shares: dict[str, list[torch.Tensor]] = {name: [] for name in named}
    for i in range(z.shape[0]):
        masked = torch.zeros_like(gz)
        masked[i] = gz[i] * factor
        grads = torch.autograd.grad(z, list(named.values()), masked, retain_graph=True)
        for name, grad in zip(named, grads, strict=True):
            shares[name].append(grad.detach().clone())
    return {name: torch.stack(grads) for name, grads in shares.items()}


def by_single_samples(model: nn.Module, loss_of: Callable[[Any, slice], torch.Tensor],
                      x: torch.Tensor, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """The gradient of each sample's own loss, one forward and backward pass a sample: independent
    of any layer's structure (no batch statistics)."""
    shares: list[list[torch.Tensor]] = [[] for _ in parameters]
    for i in range(x.shape[0]):
        loss = loss_of(model(x[i:i + 1]), slice(i, i + 1))
        for k, grad in enumerate(torch.autograd.grad(loss, parameters)):
            shares[k].append(grad)
    return [torch.stack(grads) for grads in shares]


def held_u(seng: Any, layer: Any) -> torch.Tensor:
    """The matrix U (n, rho) that a layer's curvature stands for, parameters in the layer's order."""
    parts: dict[int, torch.Tensor] = {}
    for block in seng.state.systems[layer].blocks:
        if hasattr(block, "u"):
            parts[block.index] = block.u.double()
            continue
        u = torch.einsum("kgri,kari->ikga", block.g.double(), block.a.double())
        parts[block.indices[0]] = u[..., :block.width].flatten(1)
        for k, index in enumerate(block.indices[1:]):
            parts[index] = u[..., block.width + k].flatten(1)
    return torch.cat([parts[k] for k in sorted(parts)], 1).T


def flat_gradient(layer: Any) -> torch.Tensor:
    """The gradients of a layer's parameters as one vector."""
    return torch.cat([p.grad.detach().flatten() for p in layer.parameters])

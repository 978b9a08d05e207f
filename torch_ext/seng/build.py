"""How a layer's curvature is made: from what was captured to U or its factors, and their sketches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hvd_ext.seng import LayerPlan
from hvd_ext.torch.seng import kernels
from hvd_ext.torch.seng.blocks import Block, Curvature, Explicit, Product, working
from hvd_ext.torch.seng.inventory import Layer
from hvd_ext.torch.seng.rules import Factors, PerSample

Chooser = Callable[[str, int, int], "tuple[torch.Tensor, torch.Tensor]"]
"""``choose(label, n, q)`` gives rows (q,) int64 and weights (q,) in the working precision."""


def build(layer: Layer, captured: Sequence[tuple[dict[str, int], Factors | PerSample]], *,
          scale: float, dtype: torch.dtype, step: int) -> Curvature | str:
    """A layer's unsketched curvature from the results of its rule, one for each use in a pass.

    Args:
        captured: for each use the module's slots and what the rule returned.
        scale: what gz is multiplied with to give ``G_i / sqrt(samples)``.
        dtype: what U and the factors are stored in.

    Returns:
        The curvature, or what is wrong with what was captured.
    """
    u: dict[int, torch.Tensor] = {}
    factors: list[tuple[torch.Tensor, torch.Tensor]] = []
    samples, kappa = set(), 0
    for slots, result in captured:
        if isinstance(result, Factors):
            g = result.g * scale
            samples.add(g.shape[0])
            kappa += g.shape[-1]
            bias = None if result.bias is None else result.bias * scale
            if bias is None and not (layer.plan.implicit and layer.registered.ones):
                bias = g.sum(-1).flatten(1) if "bias" in slots else None
            if layer.plan.implicit:
                factors.append((g, _with_ones(layer, slots, result.a)))
            elif "weight" in slots:
                _add(u, slots["weight"], kernels.per_sample_products(g, result.a))
            if bias is not None and "bias" in slots:
                _add(u, slots["bias"], bias)
        else:
            kappa += 1
            for name, place in slots.items():
                if name not in result:
                    return f"its rule gave nothing for the parameter {name!r}"
                samples.add(result[name].shape[0])
                _add(u, place, result[name].flatten(1) * scale)
    if len(samples) != 1:
        return f"its uses had different numbers of samples, {sorted(samples)}"
    rho = samples.pop()
    sizes = {place: layer.parameters[place].numel() for place in u}
    if any(u[place].shape[1] != size for place, size in sizes.items()):
        return "its rule gave per-sample gradients of another shape than the parameter's"
    if not all(_finite(t) for t in (*u.values(), *(t for pair in factors for t in pair))):
        return "what was captured is not finite"
    blocks: list[Block] = []
    if factors:
        product = _product_block(layer, factors, dtype)
        if isinstance(product, str):
            return product
        blocks.append(product)
    blocks += [Explicit(place, t.to(dtype), t.to(dtype)) for place, t in sorted(u.items())]
    for block in blocks:
        if isinstance(block, Explicit):
            block.xi = block.u
    r = blocks[0].g.shape[-1] // rho if isinstance(blocks[0], Product) else 0
    return Curvature(blocks, rho, kappa, r, step)


def _product_block(layer: Layer, factors: list[tuple[torch.Tensor, torch.Tensor]],
                   dtype: torch.dtype) -> Product | str:
    g = torch.cat([pair[0] for pair in factors], -1) if len(factors) > 1 else factors[0][0]
    a = torch.cat([pair[1] for pair in factors], -1) if len(factors) > 1 else factors[0][1]
    assert layer.plan.rank is not None
    try:
        g, a = kernels.truncate(g, a, layer.plan.rank)
    except torch.linalg.LinAlgError as error:
        return f"its factors could not be cut to rank {layer.plan.rank} ({error})"
    g, a = (kernels.columns_together(factor).to(dtype) for factor in (g, a))
    indices = tuple(range(len(layer.parameters))) if layer.registered.ones else (0,)
    return Product(indices, layer.groups[2], g, a, g, a)


def _with_ones(layer: Layer, slots: dict[str, int], a: torch.Tensor) -> torch.Tensor:
    """A with a row for each bias of the layer: ones for the bias of this use, zeros for others."""
    biases = len(layer.parameters) - 1
    if not biases or not layer.registered.ones:
        return a
    rows = a.new_zeros((*a.shape[:2], biases, a.shape[-1]))
    if "bias" in slots:
        rows[:, :, slots["bias"] - 1] = 1.0
    return torch.cat([a, rows], 2)


def _add(sums: dict[int, torch.Tensor], place: int, term: torch.Tensor) -> None:
    if place not in sums or sums[place].shape != term.shape:
        sums[place] = term
    else:
        sums[place] = sums[place] + term


def _finite(tensor: torch.Tensor) -> bool:
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def sketch(curvature: Curvature, plan: LayerPlan, choose: Chooser) -> None:
    """Sample rows and form Xi (SENG eq. 12, 17)."""
    if plan.sketch is not None:
        explicit = [block for block in curvature.blocks if isinstance(block, Explicit)]
        rows, weights = choose("rows", sum(b.u.shape[1] for b in explicit), plan.sketch)
        start = 0
        for block in explicit:
            inside = (rows >= start) & (rows < start + block.u.shape[1])
            block.rows, block.weights = rows[inside] - start, weights[inside]
            start += block.u.shape[1]
            block.xi = _weigh(block.u, 1, block.rows, block.weights)
    for block in curvature.blocks:
        if isinstance(block, Product):
            if plan.rows_g is not None:
                block.rows_g, block.weights_g = choose("rows_g", block.g.shape[1], plan.rows_g)
                block.xg = _weigh(block.g, 1, block.rows_g, block.weights_g.unsqueeze(1))
            if plan.rows_a is not None:
                block.rows_a, block.weights_a = choose("rows_a", block.a.shape[1], plan.rows_a)
                block.xa = _weigh(block.a, 1, block.rows_a, block.weights_a.unsqueeze(1))
                block.split = int((block.rows_a < block.width).sum())


def row_scores(curvature: Curvature, label: str) -> torch.Tensor:
    """Squared row norms of what ``label`` samples: U for "rows", the factors for the others."""
    if label == "rows":
        return torch.cat([working(b.u).square().sum(0) for b in curvature.blocks
                          if isinstance(b, Explicit)])
    block = next(b for b in curvature.blocks if isinstance(b, Product))
    factor = block.g if label == "rows_g" else block.a
    return working(factor).square().sum((0, 2))


def _weigh(tensor: torch.Tensor, axis: int, rows: torch.Tensor, weights: torch.Tensor
           ) -> torch.Tensor:
    return (working(tensor.index_select(axis, rows)) * weights).to(tensor.dtype)

"""One layer's curvature: its blocks and the small system of SENG eq. 9 that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hvd_ext.seng import LayerPlan, LayerStats
from hvd_ext.torch.seng import kernels
from hvd_ext.torch.seng.blocks import Block, Chooser, Explicit, FactoredBlock, block_from
from hvd_ext.torch.seng.embedding import EmbeddingBlock
from hvd_ext.torch.seng.implicit_unfold import ImplicitUnfold
from hvd_ext.torch.seng.layer_discovery import Layer
from hvd_ext.torch.seng.rules import Convolved, Factors, Lookup, PerSample
from hvd_ext.torch.seng.tied_embedding import TiedEmbeddingBlock

NOT_FINITE = "what was captured is not finite"
SAVED = ("rho", "kappa", "r", "step", "gram", "offset", "total", "ranks", "jitter", "coefficients")


@dataclass(eq=False)
class LayerCurvature:
    """A layer's blocks and small system.

    ``rho`` are this rank's samples, ``total`` those of all ranks that the system joins (rho but in
    full coupling) with this rank's at ``offset``; ``ranks`` is M in full coupling, else 1. ``gram``
    (total, total) and its factor ``lower`` are float64, ``step`` is when it was taken. ``r`` is 0
    without factors.
    """

    blocks: list[Block]
    rho: int
    kappa: int
    r: int
    step: int
    gram: torch.Tensor | None = None
    offset: int = 0
    total: int = 0
    ranks: int = 1
    lower: torch.Tensor | None = None
    lam: float = 0.0
    jitter: float = 0.0
    coefficients: torch.Tensor | None = None

    # Made at a refresh

    def sample_rows(self, plan: LayerPlan, choose: Chooser) -> None:
        """Sample rows of every block."""
        for block in self.blocks:
            block.sample_rows(plan, choose)

    def row_scores(self, label: str) -> torch.Tensor:
        """Squared row norms of what ``label`` ("rows", "rows_g", "rows_a") samples."""
        scores = [block.row_scores(label) for block in self.blocks]
        return torch.cat([one for one in scores if one is not None])

    def set_ranks(self, rho_by_rank: Sequence[int], rank: int) -> None:
        """The system is that of all ranks' samples from here on."""
        self.offset = sum(rho_by_rank[:rank])
        self.total, self.ranks = sum(rho_by_rank), len(rho_by_rank)

    def pad_columns(self, r: int) -> None:
        """Bring factors to ``r`` columns per sample."""
        for block in self.blocks:
            block.pad_columns(r)
        self.r = r

    def form_gram(self) -> None:
        """Put the Gram matrix together from the (sketched) blocks, in float64."""
        self.total = self.total or self.rho
        gram = self.blocks[0].gram_matrix().double()
        for block in self.blocks[1:]:
            gram = gram + block.gram_matrix()
        self.gram = gram if self.ranks == 1 else gram / self.ranks

    def without_sketch(self) -> LayerCurvature:
        """The same curvature, to be sketched and factored anew; this one stays as it is."""
        return replace(self, blocks=[block.without_sketch() for block in self.blocks], gram=None, lower=None,
                       offset=0, total=0, ranks=1)

    # Used at every step

    def project_gradients(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """``U^T g``, the right-hand side of SENG eq. 9 or 12, for all samples of the system: (total,)."""
        rhs = self.blocks[0].project_gradient(gradients)
        for block in self.blocks[1:]:
            rhs = rhs + block.project_gradient(gradients)
        return rhs if self.ranks == 1 else rhs / self.ranks ** 0.5

    def local_contribution(self, b: torch.Tensor, uc: str) -> torch.Tensor:
        """What this rank adds to ``U b``, flat, such that the mean over ranks is what is subtracted.

        Explicit blocks and the exact form give ``U_i b_i`` (SENG eq. 25, 26), the factored form the
        two means of eq. 28.

        Args:
            b: the coefficients of the system (total,).
        """
        own = b[self.offset:self.offset + self.rho]
        out = b.new_empty(sum(self._message_sizes(uc)))
        for block, part in zip(self.blocks, out.split(self._message_sizes(uc)), strict=True):
            block.local_contribution(b, own, self.ranks, uc, part)
        return out

    def apply_single_rank(self, b: torch.Tensor, gradients: Sequence[torch.Tensor], lam: float,
                          uc: str) -> None:
        """``gradients <- (gradients - U b)/lam`` in place (SENG eq. 8) where there is one rank."""
        for block in self.blocks:
            block.apply_single_rank(b, gradients, lam, uc)

    def apply_direction(self, mean: torch.Tensor, gradients: Sequence[torch.Tensor], lam: float,
                        uc: str) -> None:
        """``gradients <- (gradients - U b)/lam`` in place (SENG eq. 8) with the mean of the messages."""
        for block, part in zip(self.blocks, mean.split(self._message_sizes(uc)), strict=True):
            block.apply_direction(part, gradients, lam, uc)

    def _message_sizes(self, uc: str) -> list[int]:
        return [block.message_size(uc) for block in self.blocks]

    # State and figures

    def layer_stats(self, step: int) -> LayerStats:
        """What the report shows."""
        tensors = {id(t): t for block in self.blocks for t in block.held_tensors()}
        tensors.update({id(t): t for t in (self.gram, self.lower) if t is not None})
        b = self.coefficients
        return LayerStats(rho=self.rho, r=self.r, kappa=self.kappa, itemsize=self.blocks[0].itemsize,
                          nbytes=sum(t.numel() * t.element_size() for t in tensors.values()),
                          jitter=self.jitter, age=step - self.step,
                          coefficient_norm=None if b is None else float(b.norm()))

    def system_state(self) -> dict[str, Any]:
        """For a checkpoint: tensors and plain types; the factor is made again."""
        return {"blocks": [block.block_state() for block in self.blocks],
                **{name: getattr(self, name) for name in SAVED}}

    @classmethod
    def from_state(cls, saved: dict[str, Any], device: torch.device) -> LayerCurvature:
        """What :meth:`system_state` gave, on a device."""
        values = {name: saved[name].to(device) if isinstance(saved[name], torch.Tensor)
                  else saved[name] for name in SAVED}
        return cls(blocks=[block_from(one, device) for one in saved["blocks"]], **values)


def build_curvature(layer: Layer, captured: Sequence[tuple[dict[str, int], Factors | Lookup | PerSample]], *,
                    scale: float, dtype: torch.dtype, step: int, least: float = 0.0) -> LayerCurvature | str:
    """A layer's unsketched curvature from the results of its rule, one for each use in a pass.

    Args:
        captured: for each use the module's slots and what the rule returned.
        scale: what gz is multiplied with to give ``G_i / sqrt(samples)``.
        dtype: what U and the factors are stored in.
        least: what an adaptive rank may leave out of ``||U||_F^2``.

    Returns:
        The curvature, or what is wrong with what was captured.
    """
    u: dict[int, torch.Tensor] = {}
    factors: list[tuple[torch.Tensor, torch.Tensor | ImplicitUnfold]] = []
    tables: list[tuple[torch.Tensor, torch.Tensor]] = []
    samples, kappa = set(), 0
    given = set()
    for slots, result in captured:
        if isinstance(result, Factors):
            g = result.g * scale
            samples.add(g.shape[0])
            kappa += g.shape[2]
            bias = None if result.bias is None else result.bias * scale
            if bias is None and not (layer.plan.implicit and layer.registered.ones):
                bias = g.sum(2).flatten(1) if "bias" in slots else None
            shifted = result.shifted if isinstance(result, Convolved) else None
            if layer.plan.implicit:
                alone = shifted if len(captured) == 1 and g.shape[2] > (layer.plan.rank or 0) else None
                ready = None if alone is None else _shifted_with_ones(layer, slots, alone)
                if ready is None or ready.n_a < g.shape[3]:
                    factors.append((g, _with_ones(layer, slots, result.a)))
                else:
                    factors.append((g, ready))
            elif "weight" in slots:
                _add_term(u, slots["weight"], kernels.per_sample_products(g, result.a) if shifted is None
                          else shifted.per_sample_products(g))
            if bias is not None and "bias" in slots:
                _add_term(u, slots["bias"], bias)
            given.update(slots)
        elif isinstance(result, Lookup):
            kappa += result.index.shape[1]
            samples.add(result.index.shape[0])
            tables.append((result.index, result.g * scale))
            given.update(slots)
        else:
            kappa += 1
            given.update(result)
            for name, place in slots.items():
                if name in result:
                    samples.add(result[name].shape[0])
                    _add_term(u, place, result[name].flatten(1) * scale)
    absent = [name for slots, _ in captured for name in slots if name not in given]
    if absent:
        return f"its rule gave nothing for the parameter {absent[0]!r}"
    if len(samples) != 1:
        return f"its uses had different numbers of samples, {sorted(samples)}"
    sizes = {place: layer.parameters[place].numel() for place in u}
    if any(u[place].shape[1] != size for place, size in sizes.items()):
        return "its rule gave per-sample gradients of another shape than the parameter's"
    if not all(_is_finite(t) for t in (*u.values(), *(g for g, _ in factors),
                                       *(a.x if isinstance(a, ImplicitUnfold) else a for _, a in factors),
                                       *(g for _, g in tables))):
        return NOT_FINITE
    blocks: list[Block] = []
    table = _embedding_block(layer, tables, dtype) if tables else None
    if factors:
        product = _factored_block(layer, factors, dtype, least)
        if isinstance(product, str):
            return product
        blocks.append(product if table is None else TiedEmbeddingBlock(product, table))
    elif table is not None and u:
        _add_term(u, 0, table.to_dense())
    elif table is not None:
        blocks.append(table)
    start = 0
    for place, part in sorted(u.items()):
        stored = part.to(dtype)
        blocks.append(Explicit(place, stored, stored, start=start, height=sum(sizes.values())))
        start += sizes[place]
    return LayerCurvature(blocks, samples.pop(), kappa, blocks[0].r, step)


def _embedding_block(layer: Layer, tables: list[tuple[torch.Tensor, torch.Tensor]],
                     dtype: torch.dtype) -> EmbeddingBlock:
    index, g = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)
                for parts in zip(*tables, strict=True))
    rows = index.mT.contiguous()
    g = g.permute(2, 1, 0).unsqueeze(0).to(dtype, memory_format=torch.contiguous_format, copy=True)
    return EmbeddingBlock(0, layer.parameters[0].shape[0], rows, g, rows, g)


def _factored_block(layer: Layer, factors: list[tuple[torch.Tensor, torch.Tensor | ImplicitUnfold]],
                    dtype: torch.dtype, least: float) -> FactoredBlock | str:
    g, a = factors[0]
    if len(factors) > 1:  # dense, all of them
        g, a = (torch.cat(parts, 2) for parts in zip(*factors, strict=True))  # type: ignore[arg-type]
    assert layer.plan.rank is not None
    try:
        cut = kernels.truncate_rank(g, a, layer.plan.rank, always=layer.plan.adaptive)
    except torch.linalg.LinAlgError as error:
        return f"its factors could not be cut to rank {layer.plan.rank} ({error})"
    r = kernels.effective_rank(*cut, least) if layer.plan.adaptive else cut[0].shape[-2]
    g, a = (kernels.samples_last(factor[..., :r, :]).to(dtype) for factor in cut)
    indices = tuple(range(len(layer.parameters))) if layer.registered.ones else (0,)
    return FactoredBlock(indices, layer.groups[2], g, a, g, a)


def _shifted_with_ones(layer: Layer, slots: dict[str, int], a: ImplicitUnfold) -> ImplicitUnfold | None:
    """The same without A being formed; None where the layer has biases of other uses."""
    biases = len(layer.parameters) - 1
    if not biases or not layer.registered.ones:
        return a
    return replace(a, ones=True) if biases == 1 and "bias" in slots else None


def _with_ones(layer: Layer, slots: dict[str, int], a: torch.Tensor) -> torch.Tensor:
    """A with a row for each bias of the layer: ones for the bias of this use, zeros for others."""
    biases = len(layer.parameters) - 1
    if not biases or not layer.registered.ones:
        return a
    rows = a.new_zeros((*a.shape[:2], biases, a.shape[2]))
    if "bias" in slots:
        rows[:, :, slots["bias"] - 1] = 1.0
    # Along whichever axis is not the contiguous one, so that no element is moved on its own.
    return torch.cat([a, rows.mT], -1) if a.is_contiguous() else torch.cat([a.mT, rows], -2).mT


def _add_term(sums: dict[int, torch.Tensor], place: int, term: torch.Tensor) -> None:
    if place not in sums or sums[place].shape != term.shape:
        sums[place] = term
    else:
        sums[place] = sums[place] + term


def _is_finite(tensor: torch.Tensor) -> bool:
    # A factor may be a transposed view, which this would copy.
    low, high = torch.aminmax(tensor if tensor.is_contiguous() else tensor.mT)
    return bool(torch.isfinite(low) & torch.isfinite(high))

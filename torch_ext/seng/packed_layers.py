"""Small layers as one problem: their factors, gradients and small systems in common tensors.

A linear layer that sees one row of each sample has ``u_i = vec(g_i a_i^T)`` (kappa = 1). The factors
of all such layers are rows of one tensor each, layers of equal shape side by side, so that a step is
some calls for all of them and one product for each shape, where small layers would otherwise be
calls and little else.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hvd_ext.torch.seng.batched_solve import BatchedSolver, Flat, SingleLayer, SolveGroup, Systems
from hvd_ext.torch.seng.blocks import FactoredBlock
from hvd_ext.torch.seng.layer_curvature import LayerCurvature
from hvd_ext.torch.seng.layer_discovery import Layer

# Parameters of the largest layer that is packed: its gradient is copied in and out.
MAX_PACKED_NUMEL = 1 << 16
MOST_FRAMES = 16


@dataclass(frozen=True)
class _Shape:
    """``count`` layers of one shape, the first at place ``first``, with rows in G, A and the gradients."""

    n_g: int
    n_a: int  # with the rows of ones that stand for biases
    count: int
    first: int
    g: slice
    a: slice
    z: slice


class PackLayout:
    """Where each of some linear layers is in the tensors of a pack, and room for a step's gradients.

    Attributes:
        layers: those of equal shape side by side.
        g_rows, a_rows: of each layer in the tensors of all G and A.
        room: (sum of n_G n_A,), the gradients; those of a layer as a matrix (n_G, n_A), biases last.
    """

    def __init__(self, layers: Sequence[Layer], rho: int, device: torch.device,
                 dtype: torch.dtype) -> None:
        def key(layer: Layer) -> tuple[int, int, int]:
            return (*layer.groups[1:], len(layer.parameters) - 1)

        self.layers = sorted(layers, key=key)
        self.g_rows: list[slice] = []
        self.a_rows: list[slice] = []
        self.shapes: list[_Shape] = []
        g = a = z = 0
        for (n_g, width, ones), those in itertools.groupby(self.layers, key):
            n_a, count = width + ones, len(list(those))
            for k in range(count):
                self.g_rows.append(slice(g + k * n_g, g + (k + 1) * n_g))
                self.a_rows.append(slice(a + k * n_a, a + (k + 1) * n_a))
            ends = g + count * n_g, a + count * n_a, z + count * n_g * n_a
            self.shapes.append(_Shape(n_g, n_a, count, len(self.g_rows) - count, slice(g, ends[0]),
                                      slice(a, ends[1]), slice(z, ends[2])))
            g, a, z = ends
        self.room = torch.empty(z, device=device, dtype=dtype)
        self.z = [self.room[s.z].view(s.count, s.n_g, s.n_a) for s in self.shapes]
        self.products = torch.empty(a, rho, device=device, dtype=dtype)
        self.t = [self.products[s.a].view(s.count, s.n_a, rho) for s in self.shapes]
        self.places: list[list[torch.Tensor]] = []
        for layer, matrix in zip(self.layers, (m for stack in self.z for m in stack), strict=True):
            width = layer.groups[2]
            self.places.append([matrix[:, :width].view(layer.parameters[0].shape),
                                *(matrix[:, width + k] for k in range(len(layer.parameters) - 1))])
        self._g_sizes, self._a_sizes = ([part.stop - part.start for part in rows]
                                        for rows in (self.g_rows, self.a_rows))
        self.owner_g, self.owner_a = (
            torch.repeat_interleave(torch.tensor(sizes)).to(device)
            for sizes in (self._g_sizes, self._a_sizes))
        number = torch.arange(len(self.layers), device=device).unsqueeze(1)
        self.adds_up = (self.owner_a == number).to(dtype)  # (layers, rows of A)


    def split_g(self, g: torch.Tensor) -> list[torch.Tensor]:
        """Each layer's G, (1, n_G, 1, rho), of those of all (sum of n_G, rho)."""
        return list(g.view(1, g.shape[0], 1, -1).split(self._g_sizes, 1))

    def split_a(self, a: torch.Tensor) -> list[torch.Tensor]:
        """Each layer's A in the same way."""
        return list(a.view(1, a.shape[0], 1, -1).split(self._a_sizes, 1))


@dataclass
class PackLayoutCache:
    """Frames that were made, as long as the layers are the same."""

    made: dict[tuple[object, ...], PackLayout] = field(default_factory=dict)
    fitting: dict[Layer, bool] = field(default_factory=dict)

    def layout_for(self, layers: Sequence[Layer], rho: int, device: torch.device,
                   dtype: torch.dtype) -> PackLayout:
        """The frame of these layers for rho samples."""
        key = (*layers, rho, device, dtype)
        if key not in self.made:
            if len(self.made) >= MOST_FRAMES:
                self.made.clear()
            self.made[key] = PackLayout(layers, rho, device, dtype)
        return self.made[key]

    def group_systems(self, systems: Systems) -> BatchedSolver:
        """Systems in units: small linear layers packed, others each by itself.

        What is packed depends on nothing that ranks or a resumed run may have different, but for rho.
        """
        units: list[SolveGroup] = []
        packed: dict[tuple[int, torch.device, torch.dtype], list[Layer]] = {}
        for layer, system in systems.items():
            if layer not in self.fitting:
                self.fitting[layer] = fits_pack(layer)
            if self.fitting[layer] and can_pack(layer, system):
                key = (system.rho, layer.parameters[0].device, layer.dtype)
                packed.setdefault(key, []).append(layer)
            else:
                units.append(SingleLayer(layer, system))
        for key, layers in packed.items():
            units.append(PackedLayers(self.layout_for(layers, *key), systems))
        return BatchedSolver(systems, units)


def can_pack(layer: Layer, system: LayerCurvature) -> bool:
    """Whether the curvature of a layer that :func:`fits_pack` is that of one row a sample."""
    block = system.blocks[0]
    return (len(system.blocks) == 1 and isinstance(block, FactoredBlock) and system.ranks == 1
            and block.g.shape[2] == 1 and block.g.dtype == layer.dtype)


def fits_pack(layer: Layer) -> bool:
    """Whether a layer is small, linear and not sketched."""
    return (layer.product and layer.plan.implicit and not layer.plan.sampled and layer.groups[0] == 1
            and layer.registered.ones and not layer.lookups
            and layer.groups[1] * (layer.groups[2] + len(layer.parameters) - 1) <= MAX_PACKED_NUMEL)


def stack_factors(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Factors (1, n, 1, rho) as rows of one tensor: that whose rows they are, in order, else a copy."""
    base, rho = parts[0]._base, parts[0].shape[-1]
    if base is not None and base.shape == (sum(part.shape[1] for part in parts), rho) and (
            base.is_contiguous()):
        at = base.data_ptr()
        for part in parts:
            if part._base is not base or part.data_ptr() != at or not part.is_contiguous():
                break
            at += part.numel() * part.element_size()
        else:
            return base
    return torch.cat([part.reshape(-1, rho) for part in parts])


class PackedLayers(SolveGroup):
    """Small linear layers with one row a sample and rho samples each."""

    def __init__(self, frame: PackLayout, systems: Mapping[Layer, LayerCurvature]) -> None:
        self.frame = frame
        self.layers = frame.layers
        self.systems = [systems[layer] for layer in self.layers]
        blocks = [system.blocks[0] for system in self.systems]
        self._g, self._a = (stack_factors([getattr(block, name) for block in blocks]) for name in ("g", "a"))
        shapes = frame.shapes
        self._g_stacks = [self._g[s.g].view(s.count, s.n_g, -1) for s in shapes]
        self._a_stacks = [self._a[s.a].view(s.count, s.n_a, -1) for s in shapes]
        self._gradients: list[torch.Tensor] = []
        self._held: list[torch.Tensor] = []

    def form_gram(self) -> None:
        # SENG eq. 21 with r = 1.
        rho = self._g.shape[1]
        by_g, by_a = (factor.new_empty((len(self.layers), rho, rho)) for factor in (self._g, self._a))
        for s, g, a in zip(self.frame.shapes, self._g_stacks, self._a_stacks, strict=True):
            here = slice(s.first, s.first + s.count)
            torch.bmm(g.mT, g, out=by_g[here])
            torch.bmm(a.mT, a, out=by_a[here])
        grams = by_g.mul_(by_a).double()
        for system, gram in zip(self.systems, grams.unbind(), strict=True):
            system.total, system.gram = system.rho, gram

    def load_gradients(self, factor: float) -> None:
        self._gradients, self._held = [], []
        for layer, places in zip(self.layers, self.frame.places, strict=True):
            for parameter, place in zip(layer.parameters, places, strict=True):
                if parameter.grad is None:
                    place.zero_()
                else:
                    self._gradients.append(parameter.grad)
                    self._held.append(place)
        if self._held:
            torch._foreach_copy_(self._held, self._gradients)
        if factor != 1.0:
            self.frame.room.mul_(factor)

    def set_gradients(self, flat: Flat) -> None:
        self._gradients, self._held = [], []
        places = [place for own in self.frame.places for place in own]
        given = [one for layer in self.layers for one in flat[layer]]
        torch._foreach_copy_(places, [one.view(place.shape) for place, one in
                                      zip(places, given, strict=True)])

    def project_gradients(self) -> torch.Tensor:
        # (g_i^T Z) a_i of each sample (SENG eq. 18): products with rows of A, added up by layer.
        for z, g, t in zip(self.frame.z, self._g_stacks, self.frame.t, strict=True):
            torch.bmm(z.mT, g, out=t)
        return self.frame.adds_up @ self.frame.products.mul_(self._a)

    def local_contributions(self, b: torch.Tensor, uc: str) -> list[torch.Tensor]:
        return [one for stack in self._stack_messages(b, uc) for one in stack.flatten(1).unbind()]

    def _stack_messages(self, b: torch.Tensor, uc: str) -> list[torch.Tensor]:
        """The messages of each shape's layers, (count, n_G, n_A) or (count, n_G + n_A)."""
        if uc == "exact":
            weighed = self._g * b.index_select(0, self.frame.owner_g)  # SENG eq. 22
            return [torch.bmm(weighed[s.g].view_as(g), a.mT) for s, g, a in
                    zip(self.frame.shapes, self._g_stacks, self._a_stacks, strict=True)]
        roots = b.abs().sqrt()  # SENG eq. 23
        total = roots.sum(1, keepdim=True)
        shares = torch.where(total > 0, b / total, 0.0)
        left = (self._g * roots.index_select(0, self.frame.owner_g)).sum(1)
        right = (self._a * shares.index_select(0, self.frame.owner_a)).sum(1)
        return [torch.cat([left[s.g].view(s.count, -1), right[s.a].view(s.count, -1)], 1)
                for s in self.frame.shapes]

    def apply_directions(self, means: Sequence[torch.Tensor], lam: float, uc: str) -> None:
        self._apply_stacks([torch.stack(list(means[s.first:s.first + s.count])) for s in self.frame.shapes],
                           lam, uc)

    def apply_single_rank(self, b: torch.Tensor, lam: float, uc: str) -> None:
        if uc == "factored":
            self._apply_stacks(self._stack_messages(b, uc), lam, uc)
            return
        weighed = self._g * b.index_select(0, self.frame.owner_g)
        for z, s, g, a in zip(self.frame.z, self.frame.shapes, self._g_stacks, self._a_stacks, strict=True):
            z.baddbmm_(weighed[s.g].view_as(g), a.mT, beta=1.0 / lam, alpha=-1.0 / lam)

    def _apply_stacks(self, stacks: Sequence[torch.Tensor], lam: float, uc: str) -> None:
        for z, message, s in zip(self.frame.z, stacks, self.frame.shapes, strict=True):
            if uc == "factored":
                # One product for each number: the same bits on every rank, whatever it has packed.
                message = message[:, :s.n_g, None] * message[:, None, s.n_g:]
            z.sub_(message.view_as(z))
        self.frame.room.mul_(1.0 / lam)

    def held_gradients(self) -> list[list[torch.Tensor]]:
        return self.frame.places

    def store_directions(self, factor: float) -> None:
        if factor != 1.0:
            self.frame.room.mul_(factor)
        if self._held:
            torch._foreach_copy_(self._gradients, self._held)


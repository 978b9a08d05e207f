"""All layers' small systems of a step together: one factorization and one solve for those of equal size.

A :class:`SolveGroup` is what a step works with: a layer by itself, or the small layers of a pack
(``packed_layers.py``), whose gradients and curvature are in common tensors.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hvd_ext.torch.seng import kernels
from hvd_ext.torch.seng.layer_curvature import LayerCurvature
from hvd_ext.torch.seng.layer_discovery import Layer

Systems = Mapping[Layer, LayerCurvature]
Flat = Mapping[Layer, Sequence[torch.Tensor]]


class SolveGroup(abc.ABC):
    """Layers with systems of one size, and their gradients of a step."""

    layers: list[Layer]
    systems: list[LayerCurvature]

    @abc.abstractmethod
    def form_gram(self) -> None:
        """Give every system its Gram matrix."""

    @abc.abstractmethod
    def load_gradients(self, factor: float) -> None:
        """Take the layers' ``.grad``, times ``factor``; a missing one counts as zero."""

    @abc.abstractmethod
    def set_gradients(self, flat: Flat) -> None:
        """Take these gradients, one flat tensor per parameter."""

    @abc.abstractmethod
    def project_gradients(self) -> torch.Tensor:
        """``U^T g`` of each system: (layers, total)."""

    @abc.abstractmethod
    def local_contributions(self, b: torch.Tensor, uc: str) -> list[torch.Tensor]:
        """Each layer's flat message for its coefficients ``b`` (layers, total); see ``Block.message``."""

    @abc.abstractmethod
    def apply_directions(self, means: Sequence[torch.Tensor], lam: float, uc: str) -> None:
        """``g <- (g - U b)/lam`` (SENG eq. 8) with the means of all ranks' messages."""

    @abc.abstractmethod
    def apply_single_rank(self, b: torch.Tensor, lam: float, uc: str) -> None:
        """The same where there is one rank."""

    @abc.abstractmethod
    def held_gradients(self) -> list[list[torch.Tensor]]:
        """The gradients, or directions, as they are held: of each layer one tensor per parameter."""

    def copy_gradients(self) -> list[list[torch.Tensor]]:
        """Copies of them, flat."""
        return [[part.clone(memory_format=torch.contiguous_format).view(-1) for part in own]
                for own in self.held_gradients()]

    def rescale_stale(self, before: Flat, stale: Collection[Layer]) -> None:
        """``p <- p / (1 + g^T p)`` of layers in ``stale``, with the gradients g that were held before.

        That is ``(U U^T + g g^T + lam I)^{-1} g``, by Sherman and Morrison. Sums, not dot products, whose
        bits depend on where a tensor is in memory: replicas must agree.
        """
        for layer, own in zip(self.layers, self.held_gradients(), strict=True):
            if layer in stale:
                product = sum((part * g.view_as(part)).sum()
                              for part, g in zip(own, before[layer], strict=True))
                divisor = 1.0 + product.clamp_min(0.0)  # type: ignore[union-attr]
                for part in own:
                    part.div_(divisor)

    @abc.abstractmethod
    def store_directions(self, factor: float) -> None:
        """Put what is held, times ``factor``, into ``.grad``; a missing one stays missing."""


class SingleLayer(SolveGroup):
    """A layer by itself. Gradients are views of ``.grad``, or copies where that is not possible."""

    def __init__(self, layer: Layer, system: LayerCurvature) -> None:
        self.layers, self.systems = [layer], [system]
        self._flat: list[torch.Tensor] = []
        self._present: list[torch.Tensor] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def form_gram(self) -> None:
        self.systems[0].form_gram()

    def load_gradients(self, factor: float) -> None:
        (layer,) = self.layers
        self._flat, self._present, self._copies = [], [], []
        for parameter in layer.parameters:
            gradient = parameter.grad
            if gradient is None:
                self._flat.append(parameter.new_zeros(parameter.numel(), dtype=layer.dtype))
                continue
            flat = gradient.detach().reshape(-1)
            if flat.dtype != layer.dtype:
                flat = flat.to(layer.dtype)
            if flat.data_ptr() != gradient.data_ptr():
                self._copies.append((flat, gradient))
            if factor != 1.0:
                flat.mul_(factor)
            self._flat.append(flat)
            self._present.append(flat)

    def set_gradients(self, flat: Flat) -> None:
        self._flat, self._present, self._copies = list(flat[self.layers[0]]), [], []

    def project_gradients(self) -> torch.Tensor:
        return self.systems[0].project_gradients(self._flat).unsqueeze(0)

    def local_contributions(self, b: torch.Tensor, uc: str) -> list[torch.Tensor]:
        return [self.systems[0].local_contribution(b[0], uc)]

    def apply_directions(self, means: Sequence[torch.Tensor], lam: float, uc: str) -> None:
        self.systems[0].apply_direction(means[0], self._flat, lam, uc)

    def apply_single_rank(self, b: torch.Tensor, lam: float, uc: str) -> None:
        self.systems[0].apply_single_rank(b[0], self._flat, lam, uc)

    def held_gradients(self) -> list[list[torch.Tensor]]:
        return [self._flat]

    def store_directions(self, factor: float) -> None:
        if factor != 1.0:
            for flat in self._present:
                flat.mul_(factor)
        for flat, gradient in self._copies:
            gradient.copy_(flat.view(gradient.shape))


@dataclass(eq=False)
class _EqualSizeGroup:
    """Units whose systems have the same number of samples, and the factors of all of them."""

    units: list[SolveGroup] = field(default_factory=list)
    lower: torch.Tensor | None = None
    lam: float = 0.0

    @property
    def systems(self) -> list[LayerCurvature]:
        return [system for unit in self.units for system in unit.systems]

    def factor_systems(self, lam: float) -> list[LayerCurvature]:
        """Factor every ``lam I + U^T U`` that has no factor for this lam; those that cannot be."""
        if self.lower is not None and self.lam == lam:
            return []
        systems, failed = self.systems, []
        due = [one for one in systems if one.lower is None or one.lam != lam]
        if due:
            grams = kernels.stack_as_view([one.gram for one in due])  # type: ignore[misc]
            lower, jitters, good = kernels.factor_all(grams, lam)
            for one, own, jitter, fine in zip(due, lower.unbind(), jitters, good, strict=True):
                if fine:
                    one.lower, one.lam, one.jitter = own, lam, jitter
                else:
                    failed.append(one)
        if all(one.lower is not None for one in systems):
            self.lower, self.lam = kernels.stack_as_view([one.lower for one in systems]), lam  # type: ignore[misc]
        return failed

    def solve_systems(self, lam: float) -> list[torch.Tensor]:
        """``b`` of SENG eq. 9 or 12 of each unit: (layers, total). A lam that has no factor leaves
        the last one in place."""
        self.factor_systems(lam)
        assert self.lower is not None
        parts = [unit.project_gradients() for unit in self.units]
        b = kernels.solve_system(self.lower, parts[0] if len(parts) == 1 else torch.cat(parts))
        for system, own in zip(self.systems, b.unbind(), strict=True):
            system.coefficients = own
        return list(b.split([len(unit.layers) for unit in self.units]))


class BatchedSolver:
    """Some layers' curvature, in units.

    Args:
        units: of all layers in ``systems``.
    """

    def __init__(self, systems: Systems, units: Sequence[SolveGroup]) -> None:
        self.systems = dict(systems)
        self.units = list(units)
        sizes: dict[tuple[int, torch.device, torch.dtype], _EqualSizeGroup] = {}
        for unit in self.units:
            layer, system = unit.layers[0], unit.systems[0]
            key = (system.total or system.rho, layer.parameters[0].device, layer.dtype)
            sizes.setdefault(key, _EqualSizeGroup()).units.append(unit)
        self._sizes = list(sizes.values())

    def is_of(self, systems: Systems) -> bool:
        """Whether these are its systems, in its order."""
        return (len(systems) == len(self.systems)
                and all(one is other and self.systems[one] is systems[one]
                        for one, other in zip(self.systems, systems, strict=True)))

    def form_gram(self) -> None:
        """Put the Gram matrices together."""
        for unit in self.units:
            unit.form_gram()

    def factor_systems(self, lam: float) -> list[Layer]:
        """Factor every small system; the layers of those that have no factor."""
        failed = {id(system) for size in self._sizes for system in size.factor_systems(lam)}
        return [layer for layer, system in self.systems.items() if id(system) in failed]

    def load_gradients(self, factor: float = 1.0) -> None:
        """Take all layers' ``.grad``, times ``factor``."""
        for unit in self.units:
            unit.load_gradients(factor)

    def set_gradients(self, flat: Flat) -> None:
        """Take these gradients instead."""
        for unit in self.units:
            unit.set_gradients(flat)

    def local_contributions(self, lam: float, uc: str) -> Iterator[tuple[Layer, torch.Tensor]]:
        """What this rank adds to ``U b``, flat, such that the mean over ranks is what is subtracted.

        Each as soon as it is asked for, so that it can travel while the next one is computed.
        Explicit blocks and the exact form give ``U_i b_i`` (SENG eq. 25, 26), the factored form the
        two means of eq. 28.
        """
        for size in self._sizes:
            for unit, b in zip(size.units, size.solve_systems(lam), strict=True):
                yield from zip(unit.layers, unit.local_contributions(b, uc), strict=True)

    def apply_directions(self, means: Mapping[Layer, torch.Tensor], lam: float, uc: str) -> None:
        """``g <- (g - U b)/lam`` (SENG eq. 8) of all layers, with the means of the messages."""
        for unit in self.units:
            unit.apply_directions([means[layer] for layer in unit.layers], lam, uc)

    def apply_single_rank(self, lam: float, uc: str) -> None:
        """The same where there is one rank, to which nothing need be sent."""
        for size in self._sizes:
            for unit, b in zip(size.units, size.solve_systems(lam), strict=True):
                unit.apply_single_rank(b, lam, uc)

    def copy_gradients(self) -> dict[Layer, list[torch.Tensor]]:
        """The gradients as they are held."""
        found = {layer: flat for unit in self.units
                 for layer, flat in zip(unit.layers, unit.copy_gradients(), strict=True)}
        return {layer: found[layer] for layer in self.systems}

    def rescale_stale(self, before: Flat, stale: Collection[Layer]) -> None:
        """``p <- p / (1 + g^T p)`` of layers in ``stale``; ``before``: gradients by ``copy_gradients()``."""
        for unit in self.units:
            unit.rescale_stale(before, stale)

    def store_directions(self, factor: float = 1.0) -> None:
        """Put the directions, times ``factor``, into ``.grad``."""
        for unit in self.units:
            unit.store_directions(factor)

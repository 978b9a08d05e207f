"""All layers' small systems of a step together: one factorization and one solve for those of equal size."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hvd_ext.torch.seng import kernels
from hvd_ext.torch.seng.layer_curvature import LayerCurvature
from hvd_ext.torch.seng.layer_discovery import Layer

Systems = Mapping[Layer, LayerCurvature]
Flat = Mapping[Layer, Sequence[torch.Tensor]]


class LayerStep:
    """A layer's curvature and its gradients of a step: views of ``.grad``, else copies."""

    def __init__(self, layer: Layer, system: LayerCurvature) -> None:
        self.layer, self.system = layer, system
        self._flat: list[torch.Tensor] = []
        self._present: list[torch.Tensor] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def load_gradients(self, factor: float) -> None:
        """Take the layer's ``.grad``, times ``factor``; a missing one counts as zero."""
        self._flat, self._present, self._copies = [], [], []
        for parameter in self.layer.parameters:
            gradient = parameter.grad
            if gradient is None:
                self._flat.append(parameter.new_zeros(parameter.numel(), dtype=self.layer.dtype))
                continue
            flat = gradient.detach().reshape(-1)
            if flat.dtype != self.layer.dtype:
                flat = flat.to(self.layer.dtype)
            if flat.data_ptr() != gradient.data_ptr():
                self._copies.append((flat, gradient))
            if factor != 1.0:
                flat.mul_(factor)
            self._flat.append(flat)
            self._present.append(flat)

    def set_gradients(self, flat: Sequence[torch.Tensor]) -> None:
        """Take these gradients, one flat tensor per parameter."""
        self._flat, self._present, self._copies = list(flat), [], []

    def project_gradients(self) -> torch.Tensor:
        """``U^T g``: (total,)."""
        return self.system.project_gradients(self._flat)

    def local_contribution(self, b: torch.Tensor, uc: str) -> torch.Tensor:
        """The flat message for its coefficients ``b`` (total,); see ``Block.message``."""
        return self.system.local_contribution(b, uc)

    def apply_direction(self, mean: torch.Tensor, lam: float, uc: str) -> None:
        """``g <- (g - U b)/lam`` (SENG eq. 8) with the mean of all ranks' messages."""
        self.system.apply_direction(mean, self._flat, lam, uc)

    def apply_single_rank(self, b: torch.Tensor, lam: float, uc: str) -> None:
        """The same where there is one rank."""
        self.system.apply_single_rank(b, self._flat, lam, uc)

    def copy_gradients(self) -> list[torch.Tensor]:
        """Copies of the gradients, or directions, as they are held."""
        return [part.clone(memory_format=torch.contiguous_format).view(-1) for part in self._flat]

    def rescale_direction(self, before: Sequence[torch.Tensor]) -> None:
        """``p <- p / (1 + g^T p)`` with the gradients g that were held before.

        That is ``(U U^T + g g^T + lam I)^{-1} g``, by Sherman and Morrison. Sums, not dot products, whose
        bits depend on where a tensor is in memory: replicas must agree.
        """
        product = sum((part * g.view_as(part)).sum() for part, g in zip(self._flat, before, strict=True))
        divisor = 1.0 + product.clamp_min(0.0)  # type: ignore[union-attr]
        for part in self._flat:
            part.div_(divisor)

    def store_direction(self, factor: float) -> None:
        """Put what is held, times ``factor``, into ``.grad``; a missing one stays missing."""
        if factor != 1.0:
            for flat in self._present:
                flat.mul_(factor)
        for flat, gradient in self._copies:
            gradient.copy_(flat.view(gradient.shape))


@dataclass(eq=False)
class _EqualSizeGroup:
    """Layers whose systems have the same number of samples, and the factors of all of them."""

    layers: list[LayerStep] = field(default_factory=list)
    lower: torch.Tensor | None = None
    lam: float = 0.0

    @property
    def systems(self) -> list[LayerCurvature]:
        return [one.system for one in self.layers]

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
        """``b`` of SENG eq. 9 or 12 of each layer: (total,). A lam that has no factor leaves the last one in
        place."""
        self.factor_systems(lam)
        assert self.lower is not None
        parts = [one.project_gradients() for one in self.layers]
        solved = kernels.solve_system(self.lower, parts[0][None] if len(parts) == 1 else torch.stack(parts))
        for system, b in zip(self.systems, found := list(solved.unbind()), strict=True):
            system.coefficients = b
        return found


class BatchedSolver:
    """Some layers' curvature and gradients, solved together."""

    def __init__(self, systems: Systems) -> None:
        self.systems = dict(systems)
        self.layers = [LayerStep(layer, system) for layer, system in systems.items()]
        sizes: dict[tuple[int, torch.device, torch.dtype], _EqualSizeGroup] = {}
        for one in self.layers:
            key = (one.system.total or one.system.rho, one.layer.parameters[0].device, one.layer.dtype)
            sizes.setdefault(key, _EqualSizeGroup()).layers.append(one)
        self._sizes = list(sizes.values())

    def is_of(self, systems: Systems) -> bool:
        """Whether these are its systems, in its order."""
        return (len(systems) == len(self.systems)
                and all(one is other and self.systems[one] is systems[one]
                        for one, other in zip(self.systems, systems, strict=True)))

    def form_gram(self) -> None:
        """Put the Gram matrices together."""
        for one in self.layers:
            one.system.form_gram()

    def factor_systems(self, lam: float) -> list[Layer]:
        """Factor every small system; the layers of those that have no factor."""
        failed = {id(system) for size in self._sizes for system in size.factor_systems(lam)}
        return [layer for layer, system in self.systems.items() if id(system) in failed]

    def load_gradients(self, factor: float = 1.0) -> None:
        """Take all layers' ``.grad``, times ``factor``."""
        for one in self.layers:
            one.load_gradients(factor)

    def set_gradients(self, flat: Flat) -> None:
        """Take these gradients instead, of each layer one flat tensor per parameter."""
        for one in self.layers:
            one.set_gradients(flat[one.layer])

    def local_contributions(self, lam: float, uc: str) -> Iterator[tuple[Layer, torch.Tensor]]:
        """What this rank adds to ``U b``, flat, such that the mean over ranks is what is subtracted.

        Each as soon as it is asked for, so that it can travel while the next one is computed.
        Explicit blocks and the exact form give ``U_i b_i`` (SENG eq. 25, 26), the factored form the
        two means of eq. 28.
        """
        for one, b in self._solve(lam):
            yield one.layer, one.local_contribution(b, uc)

    def _solve(self, lam: float) -> Iterator[tuple[LayerStep, torch.Tensor]]:
        for size in self._sizes:
            yield from zip(size.layers, size.solve_systems(lam), strict=True)

    def apply_directions(self, means: Mapping[Layer, torch.Tensor], lam: float, uc: str) -> None:
        """``g <- (g - U b)/lam`` (SENG eq. 8) of all layers, with the means of the messages."""
        for one in self.layers:
            one.apply_direction(means[one.layer], lam, uc)

    def apply_single_rank(self, lam: float, uc: str) -> None:
        """The same where there is one rank, to which nothing need be sent."""
        for one, b in self._solve(lam):
            one.apply_single_rank(b, lam, uc)

    def copy_gradients(self) -> dict[Layer, list[torch.Tensor]]:
        """The gradients as they are held."""
        return {one.layer: one.copy_gradients() for one in self.layers}

    def rescale_stale(self, before: Flat, stale: Collection[Layer]) -> None:
        """Rescale directions of layers in ``stale``; ``before``: gradients by ``copy_gradients()``."""
        for one in self.layers:
            if one.layer in stale:
                one.rescale_direction(before[one.layer])

    def store_directions(self, factor: float = 1.0) -> None:
        """Put the directions, times ``factor``, into ``.grad``."""
        for one in self.layers:
            one.store_direction(factor)

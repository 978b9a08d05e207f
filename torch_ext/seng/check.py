"""The gradient check: the captured samples' gradients of a layer must add up to its own gradient.

Both are of this rank and this backward pass: the layer's gradient is seen as it reaches the parameter,
before it is accumulated or reduced. What does not add up was not all captured: a weight used past its
module's ``forward``, an output that is differentiated twice, a rule that is not this module's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hvd_ext.torch.seng.layer_discovery import Layer
from hvd_ext.torch.seng.rules import Factors, Lookup, PerSample

# Relative error that passes: what sums in another order differ by, with room. Gradients computed in half
# precision, or with TF32's 10 bits of mantissa, differ by that much from the same in full.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
TF32 = 1e-2
HALF = 5e-2
CANCELLED = 8  # times eps times a bound of the sum: where samples cancel, rounding is all there is


@dataclass
class Sum:
    """One parameter's sum over samples; ``size`` bounds what was added, the other two are squares."""

    total: torch.Tensor | None
    size: torch.Tensor
    error: torch.Tensor
    norm: torch.Tensor


@dataclass(frozen=True)
class CheckResult:
    """``passed`` is None when it cannot be said; ``proved``: there was a gradient to compare with."""

    passed: bool | None
    proved: bool = False
    error: float = 0.0


@dataclass
class _Expected:
    tolerance: float
    epsilon: float
    candidates: list[dict[int, Sum]]
    early: dict[int, torch.Tensor] = field(default_factory=dict)


class GradientCheck:
    """Watches the gradients of some layers' parameters during one backward pass or several."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._expected: dict[Layer, _Expected] = {}
        self._early: dict[Layer, dict[int, torch.Tensor]] = {}

    def install_hooks(self, layers: Sequence[Layer]) -> None:
        """Watch the parameters of these layers, instead of any others."""
        self.remove_hooks()
        for layer in layers:
            for place, parameter in enumerate(layer.parameters):
                def hook(gradient: torch.Tensor, layer: Layer = layer, place: int = place) -> None:
                    self._on_gradient(layer, place, gradient.detach())

                self._handles.append(parameter.register_hook(hook))

    def remove_hooks(self) -> None:
        """Remove the hooks and forget everything."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._expected, self._early = {}, {}

    def forget_layer(self, layer: Layer) -> None:
        """A new forward pass has begun."""
        self._expected.pop(layer, None)
        self._early.pop(layer, None)

    def expect_gradients(self, layer: Layer, candidates: Sequence[dict[int, Sum]],
                         dtypes: set[torch.dtype]) -> None:
        """What each candidate rule of a layer says its gradients are."""
        one = _Expected(_allowed_error(layer, dtypes), torch.finfo(layer.dtype).eps, list(candidates))
        self._expected[layer] = one
        for place, gradient in self._early.pop(layer, {}).items():
            _compare_gradient(one, place, gradient)

    def _on_gradient(self, layer: Layer, place: int, gradient: torch.Tensor) -> None:
        if gradient.is_sparse:
            raise ValueError(f"the gradient of {layer.name} is sparse, and was not meant to be when "
                             "hvd.SENG(model) was made; set sparse=True of the layer before")
        if layer in self._expected:
            _compare_gradient(self._expected[layer], place, gradient)
            return
        early = self._early.setdefault(layer, {})
        early[place] = early[place] + gradient if place in early else gradient.clone()

    def is_single_use(self) -> list[Layer]:
        """Layers that got a gradient without having been caught."""
        return [layer for layer, early in self._early.items()
                if layer not in self._expected and any(bool(g.any()) for g in early.values())]

    def read_verdicts(self, layer: Layer) -> list[CheckResult]:
        """Of each candidate that was expected."""
        one = self._expected.pop(layer, None)
        if one is None:
            return []
        found = []
        for sums in one.candidates:
            for each in sums.values():
                if each.total is not None:  # nothing arrived: there is no gradient
                    each.error = each.total.square().sum(dtype=torch.float64)
                    each.total = None
            if not sums:
                found.append(CheckResult(False))
                continue
            figures = torch.stack([
                torch.stack([each.error, each.norm, each.size.double().square()])
                for each in sums.values()]).sqrt().tolist()  # each parameter's error, norm, size
            if not all(math.isfinite(error) and math.isfinite(norm) for error, norm, _ in figures):
                found.append(CheckResult(None))
                continue
            if one.tolerance == HALF:  # a norm's bias summed up in half precision may be all rounding
                figures = [[math.hypot(*column) for column in zip(*figures, strict=True)]]
            # Of the whole layer: a bias whose samples cancel within themselves has a small size of its own.
            rounding = CANCELLED * one.epsilon * math.hypot(*(size for _, _, size in figures))
            passed = all(error <= one.tolerance * norm + rounding for error, norm, _ in figures)
            found.append(CheckResult(passed, any(norm > 0.0 for _, norm, _ in figures),
                                     max(error / max(norm, 1e-300) for error, norm, _ in figures)))
        return found


def add_up(layer: Layer, captured: Sequence[tuple[dict[str, int], Factors | Lookup | PerSample]]
           ) -> dict[int, Sum]:
    """The sums over samples of a rule's results, by the parameter's place in the layer."""
    sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(place: int, total: torch.Tensor, size: torch.Tensor) -> None:
        if place in sums:
            total, size = sums[place][0] + total.reshape(-1), sums[place][1] + size
        sums[place] = total.reshape(-1), size

    for slots, result in captured:
        if isinstance(result, Factors):
            # (groups, n_G, samples kappa) and (groups, samples kappa, n_A)
            g, a = (t.transpose(0, 1).flatten(1, 2) for t in (result.g, result.a))
            if "weight" in slots:
                add(slots["weight"], torch.matmul(g.mT, a), result.g.norm() * result.a.norm())
            if "bias" in slots:
                each = result.bias
                if each is None:
                    each = result.g.transpose(1, 2).flatten(0, 1).flatten(1)
                add(slots["bias"], each.sum(0), each.norm() * len(each) ** 0.5)
        elif isinstance(result, Lookup):
            parameter = layer.parameters[slots["weight"]]
            table = result.g.new_zeros(parameter.shape)
            table.index_add_(0, result.index.reshape(-1), result.g.reshape(-1, table.shape[1]))
            add(slots["weight"], table, result.g.norm() * result.index.numel() ** 0.5)
        else:
            for name, place in slots.items():
                if name in result:
                    add(place, result[name].sum(0), result[name].norm() * len(result[name]) ** 0.5)
    return {place: Sum(total, size, torch.zeros_like(size, dtype=torch.float64),
                       torch.zeros_like(size, dtype=torch.float64))
            for place, (total, size) in sums.items()}


def _compare_gradient(expected: _Expected, place: int, gradient: torch.Tensor) -> None:
    for sums in expected.candidates:
        one = sums.get(place)
        flat = gradient.reshape(-1)
        if one is None:
            one = sums[place] = Sum(torch.zeros_like(flat), *(flat.new_zeros((), dtype=torch.float64)
                                                              for _ in range(3)))
        if one.total is not None and one.total.numel() != flat.numel():
            one.error = torch.full_like(one.error, 1e30)
        elif one.total is None:
            # A second gradient in one pass: parts of it come from calls that are not in the sum.
            one.error = one.error + flat.square().sum(dtype=torch.float64)
        else:
            flat = flat.to(one.total.dtype)
            one.error = (one.total - flat).square().sum(dtype=torch.float64)
        one.norm = one.norm + flat.square().sum(dtype=torch.float64)
        one.total = None


def _allowed_error(layer: Layer, dtypes: set[torch.dtype]) -> float:
    seen = dtypes | {p.dtype for p in layer.parameters}
    if seen & {torch.float16, torch.bfloat16}:
        return HALF
    if layer.dtype == torch.float32 and layer.parameters[0].is_cuda and (
            torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        return TF32
    return TOLERANCES[layer.dtype]

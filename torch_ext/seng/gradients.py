"""A layer's gradients as flat tensors that can be changed in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hvd_ext.torch.seng.capture import working_dtype
from hvd_ext.torch.seng.inventory import Layer


class Gradients:
    """Views of a layer's ``.grad``, one ``(n,)`` a parameter, times ``factor``.

    A gradient in half precision, or not contiguous, is a copy that ``write_back`` returns; a
    missing one counts as zero, so that every rank sends the same messages, and stays missing.
    """

    def __init__(self, layer: Layer, factor: float = 1.0) -> None:
        self.flat: list[torch.Tensor] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._present: list[torch.Tensor] = []
        dtype = working_dtype(layer)
        for parameter in layer.parameters:
            gradient = parameter.grad
            if gradient is None:
                self.flat.append(parameter.new_zeros(parameter.numel(), dtype=dtype))
                continue
            flat = gradient.detach().reshape(-1).to(dtype)
            if flat.data_ptr() != gradient.data_ptr():
                self._copies.append((flat, gradient))
            if factor != 1.0:
                flat.mul_(factor)
            self.flat.append(flat)
            self._present.append(flat)

    def write_back(self, factor: float = 1.0) -> None:
        """Multiply by ``factor`` and put copies back into ``.grad``."""
        if factor != 1.0:
            for flat in self._present:
                flat.mul_(factor)
        for flat, gradient in self._copies:
            gradient.copy_(flat.view(gradient.shape))


def all_finite(gradients: Iterable[torch.Tensor]) -> bool:
    """Whether no element is infinite or NaN."""
    tensors = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor.sum(dtype=torch.float32))
    # A sum is the cheapest pass that lets nothing infinite through; only when it is not finite,
    # which finite but large numbers can cause too, every element is looked at.
    if all(bool(torch.isfinite(torch.stack(sums)).all()) for sums in by_device.values()):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

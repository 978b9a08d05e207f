"""A convolution's A without its patches being copied out of the input.

Column k of A is the patch of x at position k. A product with A needs no patches: for each place of
the kernel it is one with x itself, shifted, if what it is multiplied with has gaps where a row of
positions ends. That moves each number of x once in place of once for each place of the kernel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

# Positions from which it is faster than copying the patches (measured with 64 and 128 channels, 3 × 3).
MIN_POSITIONS = 128


@dataclass(frozen=True)
class ImplicitUnfold:
    """A of a convolution with stride 1 in one group, n_A = channels × places of the kernel (+ 1).

    Args:
        x: (rho, channels, height, width), padded and contiguous.
        positions: height and width of the output.
        ones: whether a row of ones stands for the bias.
    """

    x: torch.Tensor
    kernel: tuple[int, int]
    dilation: tuple[int, int]
    positions: tuple[int, int]
    ones: bool = False

    @property
    def n_a(self) -> int:
        """Rows of A."""
        return self.x.shape[1] * self.kernel[0] * self.kernel[1] + self.ones

    def _shifted_inputs(self, length: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The places of the kernel, and x as each sees it: (rho, channels, length)."""
        flat = self.x.flatten(2)
        steps = itertools.product(range(self.kernel[0]), range(self.kernel[1]))
        for place, (i, j) in enumerate(steps):
            start = i * self.dilation[0] * self.x.shape[3] + j * self.dilation[1]
            yield place, flat[:, :, start:start + length]

    def multiply(self, v: torch.Tensor) -> torch.Tensor:
        """``A v`` for ``v`` (rho, 1, kappa, r): (rho, 1, n_A, r)."""
        rho, r = v.shape[0], v.shape[3]
        (height, width), gap = self.positions, self.x.shape[3]
        spread = v.new_zeros((rho, height, gap, r))
        spread[:, :, :width] = v.reshape(rho, height, width, r)
        length = (height - 1) * gap + width
        spread = spread.flatten(1, 2)[:, :length]
        out = v.new_empty((rho, self.x.shape[1], self.kernel[0] * self.kernel[1], r))
        for place, x in self._shifted_inputs(length):
            out[:, :, place] = torch.bmm(x, spread)
        product = out.flatten(1, 2)
        if self.ones:
            product = torch.cat([product, v.sum(2)], 1)
        return product.unsqueeze(1)

    def per_sample_products(self, g: torch.Tensor) -> torch.Tensor:
        """``vec(G_i A_i^T)`` for ``g`` (rho, 1, kappa, n_G), without ones: (rho, n_G n_A)."""
        (height, width), gap = self.positions, self.x.shape[3]
        rho, n_g = g.shape[0], g.shape[3]
        spread = g.new_zeros((rho, n_g, height, gap))
        spread[..., :width] = g.mT.reshape(rho, n_g, height, width)
        length = (height - 1) * gap + width
        spread = spread.flatten(2)[:, :, :length]
        out = g.new_empty((rho, n_g, self.x.shape[1], self.kernel[0] * self.kernel[1]))
        for place, x in self._shifted_inputs(length):
            out[..., place] = torch.bmm(spread, x.mT)
        return out.flatten(1)


def shifted_input(module: nn.Module, x: torch.Tensor, positions: tuple[int, ...]) -> ImplicitUnfold | None:
    """A padded ``x`` as a convolution's A; None where its patches are better copied."""
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or set(module.stride) != {1}:
        return None
    if math.prod(positions) < MIN_POSITIONS or math.prod(module.kernel_size) == 1:
        return None
    height, width = ((k - 1) * d + size for k, d, size in
                     zip(module.kernel_size, module.dilation, positions, strict=True))
    if x.shape[2] < height or x.shape[3] < width:
        return None
    kernel, dilation = ((int(pair[0]), int(pair[1])) for pair in (module.kernel_size, module.dilation))
    return ImplicitUnfold(x.contiguous(), kernel, dilation, (positions[0], positions[1]))

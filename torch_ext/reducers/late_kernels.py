"""The compensation of a gradient that is applied one step late, elementwise, on any device."""

from __future__ import annotations

import torch

from hvd_ext.delay import Late
from hvd_ext.torch.reducers.delay_kernels import CPU_CHUNK, accumulation_dtype


def compensate(gradient: torch.Tensor, now: torch.Tensor, before: torch.Tensor,
               mean_square: torch.Tensor | None, rule: Late, scale: float) -> None:
    """Turn the gradient g taken at weights ``before`` into one for the weights ``now``, in place.

    ``g <- g + lam g*g*(now - before)``, with ``lam / sqrt(MeanSquare + eps)`` for an adaptive rule.

    Args:
        gradient: ``scale`` times g; any shape and floating dtype. Half precision is computed in float32.
        now, before: weights of the gradient's shape and dtype.
        mean_square: MeanSquare of g, updated in place; float32 (float64 for float64). None for a
            constant lam.
        rule: the strength.
        scale: the loss scale that the gradient carries.
    """
    parts = [gradient, now, before, *(() if mean_square is None else (mean_square,))]
    if all(part.is_contiguous() for part in parts):
        parts = [part.view(-1) for part in parts]
    length = parts[0].shape[0] if parts[0].dim() == 1 else 1
    step = length if gradient.is_cuda else max(1, CPU_CHUNK * torch.get_num_threads())
    if parts[0].dim() != 1 or length <= step:
        _compensate(parts, rule, scale)
        return
    for start in range(0, length, step):
        _compensate([part[start:start + step] for part in parts], rule, scale)


def _compensate(parts: list[torch.Tensor], rule: Late, scale: float) -> None:
    gradient, now, before, *kept = parts
    wide = gradient.to(accumulation_dtype(gradient.dtype))
    correction = now.to(wide.dtype) - before
    correction.mul_(wide).mul_(wide)
    for mean_square in kept:
        mean_square.mul_(rule.decay).addcmul_(wide, wide, value=(1 - rule.decay) / scale**2)
        correction.mul_(torch.add(mean_square, rule.eps).rsqrt_())
    gradient.copy_(wide.add_(correction, alpha=rule.lam / scale))

"""The compensation of a gradient that is applied one step late, elementwise, on any device."""

from __future__ import annotations

import torch

from hvd_ext.reducers.delay_compensation import DelayedUpdate
from hvd_ext.torch.reducers.kernels.delay_compensation import CPU_CHUNK, accumulation_dtype


def compensate_gradient(gradient: torch.Tensor, now: torch.Tensor, before: torch.Tensor,
                        mean_square: torch.Tensor | None, rule: DelayedUpdate, scale: float,
                        out: torch.Tensor) -> None:
    """Turn the gradient g taken at weights ``before`` into one for the weights ``now``, into ``out``.

    ``g + lam g*g*(now - before)``, with ``lam / sqrt(MeanSquare + eps)`` for an adaptive rule, where
    MeanSquare is as :func:`advance_mean_square` will make it.

    Args:
        gradient: ``scale`` times g; any shape and floating dtype. Half precision is computed in float32.
        now, before: weights of the gradient's shape and dtype.
        mean_square: MeanSquare before g; float32 (float64 for float64). None for a constant lam.
        rule: the strength.
        scale: the loss scale that the gradient carries.
        out: of the gradient's shape and dtype.
    """
    parts = [gradient, now, before, out, *(() if mean_square is None else (mean_square,))]
    if all(part.is_contiguous() for part in parts):
        parts = [part.view(-1) for part in parts]
    length = parts[0].shape[0] if parts[0].dim() == 1 else 1
    step = length if gradient.is_cuda else max(1, CPU_CHUNK * torch.get_num_threads())
    if parts[0].dim() != 1 or length <= step:
        _compensate_parts(parts, rule, scale)
        return
    for start in range(0, length, step):
        _compensate_parts([part[start:start + step] for part in parts], rule, scale)


def _compensate_parts(parts: list[torch.Tensor], rule: DelayedUpdate, scale: float) -> None:
    gradient, now, before, out, *kept = parts
    wide = gradient.to(accumulation_dtype(gradient.dtype))
    correction = now.to(wide.dtype) - before
    correction.mul_(wide).mul_(wide)
    for mean_square in kept:
        advanced = mean_square.clone()
        advance_mean_square(advanced, wide, rule, scale)
        correction.mul_(advanced.add_(rule.eps).rsqrt_())
    out.copy_(torch.add(wide, correction, alpha=rule.lam / scale))


def advance_mean_square(mean_square: torch.Tensor, gradient: torch.Tensor, rule: DelayedUpdate,
                        scale: float) -> None:
    """``MeanSquare <- decay MeanSquare + (1 - decay) g*g`` in place, of ``gradient = scale * g``."""
    wide = gradient.to(mean_square.dtype)
    mean_square.mul_(rule.decay).addcmul_(wide, wide, value=(1 - rule.decay) / scale**2)

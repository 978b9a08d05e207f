"""The delay-compensated sum of several workers' gradients, elementwise, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hvd_ext.reducers.delay_compensation.config import DelayCompensated
from hvd_ext.torch import kernels

# Elements a thread takes at a time on the CPU: the five arrays of the recursion stay in its cache.
CPU_CHUNK = 2**16


@dataclass(frozen=True)
class Recursion:
    """What one call of :func:`compensated_sum` needs besides tensors.

    Args:
        step: ``lr / M``, the step of one worker.
        lam: lam, or lam0 with ``adaptive``.
        adaptive, decay, eps: the rule of ``MeanSquare``; unused for a constant lam.
        cumulative: displacement by all gradients before, or by the worker's own step.
        scale: the workers' gradients are ``scale`` times the rows given (loss scale, micro-batches).
        divisor: what the sum is divided by, before it is rounded to half precision.
    """

    step: float
    lam: float
    adaptive: bool
    decay: float
    eps: float
    cumulative: bool
    scale: float = 1.0
    divisor: float = 1.0

    @classmethod
    def from_settings(cls, settings: DelayCompensated, step: float, *, scale: float,
                      divisor: float) -> Recursion:
        """The recursion of these settings."""
        return cls(step=step, lam=settings.lam, adaptive=settings.keeps_mean_square, decay=settings.decay,
                   eps=settings.eps, cumulative=settings.displacement == "cumulative", scale=scale,
                   divisor=divisor)

    @property
    def strength(self) -> float:
        """What the correction of a row is multiplied by."""
        return self.step * self.lam * self.scale**2

    @property
    def fresh(self) -> float:
        """What a row's square is multiplied by on its way into MeanSquare."""
        return (1 - self.decay) * self.scale**2


def compensated_sum(rows: Sequence[torch.Tensor], rule: Recursion,
                    mean_square: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """Write ``sum_j c^j / (scale divisor)`` into ``out``, the rows in their order.

    With ``g^j = scale * rows[j]`` the terms are ``c^j = g^j + lam g^j*g^j*(w~_j - w_t)`` (DC-ASGD
    supplement eq. 95). Since ``w~_j - w_t = -step * sum_{i<j} c^i``, the running sum S itself is
    the displacement and ``S <- S + g - step*lam*g*g*S`` is the whole recursion.

    Args:
        rows: the workers' gradients of this slice, 1-D, of equal length and floating dtype.
        rule: the recursion's settings.
        mean_square: MeanSquare of the slice, updated in place; float32 (float64 for float64 rows).
            None with a constant lam.
        out: 1-D of the rows' length and dtype; may be one of them. Half precision is computed in float32.

    Returns:
        ``out``.
    """
    if kernels.compensated_sum(rows, rule, mean_square, out):
        return out
    length = out.numel()
    chunk = length if out.is_cuda else min(length, CPU_CHUNK * torch.get_num_threads())
    wide = accumulation_dtype(out.dtype)
    scratch = torch.empty((3, chunk), dtype=wide, device=out.device)
    for start in range(0, length, max(1, chunk)):
        end = min(start + chunk, length)
        pieces = [row[start:end] for row in rows]
        ms = None if mean_square is None else mean_square[start:end]
        _apply_recursion(pieces, rule, ms, out[start:end], scratch[:, : end - start])
    return out


def _apply_recursion(rows: Sequence[torch.Tensor], rule: Recursion, mean_square: torch.Tensor | None,
                     out: torch.Tensor, scratch: torch.Tensor) -> None:
    correction, root, wide = scratch
    needed = any(row.data_ptr() == out.data_ptr() for row in rows[1:])  # after the first has been written
    total = out if out.dtype == wide.dtype and not needed else wide
    for number, row in enumerate(rows):
        gradient = row.to(wide.dtype)
        if mean_square is not None:
            mean_square.mul_(rule.decay).addcmul_(gradient, gradient, value=rule.fresh)
        if number == 0 and rule.cumulative:
            total.copy_(gradient)  # nothing was applied before the first
            continue
        if number == 0:
            total.zero_()
        torch.mul(gradient, total if rule.cumulative else gradient, out=correction)
        if mean_square is not None:
            torch.add(mean_square, rule.eps, out=root)
            correction.mul_(root.rsqrt_())
        total.add_(gradient).addcmul_(gradient, correction, value=-rule.strength)
    if rule.divisor != 1.0:
        total.div_(rule.divisor)
    if total is not out:
        out.copy_(total)


def plain_sum(rows: Sequence[torch.Tensor], out: torch.Tensor, divisor: float = 1.0) -> torch.Tensor:
    """Write the rows' plain sum, divided, into ``out``; in their order, as :func:`compensated_sum`."""
    total = rows[0].to(accumulation_dtype(out.dtype), copy=True)
    for row in rows[1:]:
        total.add_(row)
    return out.copy_(total.div_(divisor))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def square_norm(flat: torch.Tensor) -> torch.Tensor:
    """The squared 2-norm of a 1-D tensor, a 0-D tensor; half precision is summed in float32."""
    wide = flat.to(accumulation_dtype(flat.dtype))
    return torch.dot(wide, wide)

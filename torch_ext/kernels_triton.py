"""Passes over memory that are taken once, for CUDA tensors: Triton's, which PyTorch's CUDA build brings.

Tests run them on the CPU, through Triton's interpreter (``TRITON_INTERPRET=1``). They have not run on a GPU,
so that they are taken only where ``HVD_EXT_KERNELS=triton`` asks for them (``hvd_ext.torch.kernels``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from hvd_ext.torch.reducers.kernels.delay_compensation import Recursion

BLOCK = 1024
"""Elements a program takes; the interpreter runs one program after another."""


@triton.jit
def _recursion_kernel(row0, rows, mean_square, out, length, count, constants, ADAPTIVE: tl.constexpr,
                      CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr):
    """``hvd_ext.kernels.recursion.compensated_sum``; rows are byte offsets from ``row0``."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < length
    decay, fresh, eps = tl.load(constants), tl.load(constants + 1), tl.load(constants + 2)
    strength, divisor = tl.load(constants + 3), tl.load(constants + 4)
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    if ADAPTIVE:
        square = tl.load(mean_square + places, mask=inside, other=0.0)
    for number in range(count):
        g = tl.load(row0 + tl.load(rows + number) + places, mask=inside, other=0.0)
        correction = g * total if CUMULATIVE else g * g
        if ADAPTIVE:
            square = square * decay + fresh * g * g
            correction = correction / tl.sqrt(square + eps)
        correction = strength * g * correction
        if CUMULATIVE:  # nothing was applied before the first, of which zero times infinity is not nothing
            correction = tl.where(number == 0, 0.0, correction)
        total = total + g + correction
    if ADAPTIVE:
        tl.store(mean_square + places, square, mask=inside)
    tl.store(out + places, total / divisor, mask=inside)


def compensated_sum(rows: Sequence[torch.Tensor], rule: Recursion, mean_square: torch.Tensor | None,
                    out: torch.Tensor) -> None:
    """As ``delay_kernels.compensated_sum``, in one pass whatever the number of rows."""
    if not out.numel():
        return
    first, size = rows[0].data_ptr(), out.element_size()
    offsets = [row.data_ptr() - first for row in rows]
    if any(offset % size for offset in offsets):
        raise ValueError("rows must lie a multiple of an element's size apart")
    constants = _on_device([rule.decay, rule.fresh, rule.eps, -rule.strength, rule.divisor], out)
    _recursion_kernel[_grid_size(out)](
        rows[0], _on_device([offset // size for offset in offsets], out, torch.int64),
        out if mean_square is None else mean_square, out, out.numel(), len(rows), constants,
        ADAPTIVE=mean_square is not None, CUMULATIVE=rule.cumulative, BLOCK=BLOCK)


@triton.jit
def _count_kernel(flat, threshold, counts, length, BLOCK: tl.constexpr):
    """How many of a block's magnitudes are at or above the threshold."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    magnitude = tl.abs(tl.load(flat + places, mask=places < length, other=0.0))
    least = tl.load(threshold)
    hit = (magnitude >= least) & (magnitude > 0) & (places < length)
    tl.store(counts + tl.program_id(0), tl.sum(hit.to(tl.int64)))


@triton.jit
def _compact_kernel(flat, threshold, ends, found, length, BLOCK: tl.constexpr):
    """Their positions, rising, to where the blocks before end."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    magnitude = tl.abs(tl.load(flat + places, mask=places < length, other=0.0))
    least = tl.load(threshold)
    hit = (magnitude >= least) & (magnitude > 0) & (places < length)
    begin = tl.load(ends + tl.program_id(0)) - tl.sum(hit.to(tl.int64))
    tl.store(found + begin + tl.cumsum(hit.to(tl.int64), 0) - 1, places, mask=hit)


def find_above(flat: torch.Tensor, threshold: float) -> torch.Tensor:
    """Rising positions of magnitudes at or above a threshold; above it when it is zero."""
    if not flat.numel():
        return flat.new_empty(0, dtype=torch.int64)
    least = _on_device([threshold], flat)
    counts = torch.empty(_grid_size(flat)[0], dtype=torch.int64, device=flat.device)
    _count_kernel[_grid_size(flat)](flat, least, counts, flat.numel(), BLOCK=BLOCK)
    ends = counts.cumsum(0)
    found = torch.empty(int(ends[-1]), dtype=torch.int64, device=flat.device)
    _compact_kernel[_grid_size(flat)](flat, least, ends, found, flat.numel(), BLOCK=BLOCK)
    return found


@triton.jit
def _split_kernel(flat, positions, values, limit, length, BLOCK: tl.constexpr):
    """Chosen entries, rounded, out of ``flat``; what the rounding takes away stays in it."""
    numbers = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = numbers < length
    where = tl.load(positions + numbers, mask=inside, other=0)
    exact = tl.load(flat + where, mask=inside, other=0.0)
    most = tl.load(limit)
    rounded = tl.minimum(tl.maximum(exact, -most), most).to(values.dtype.element_ty)
    tl.store(values + numbers, rounded, mask=inside)
    tl.store(flat + where, exact - rounded.to(exact.dtype), mask=inside)


def split_selected(flat: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As ``topk_kernels.split``: gather, round, keep the rest, in one pass over the chosen; no bfloat16."""
    values = torch.empty(positions.numel(), dtype=dtype, device=flat.device)
    if positions.numel():
        limit = min(torch.finfo(dtype).max, torch.finfo(flat.dtype).max)
        _split_kernel[_grid_size(positions)](flat, positions, values, _on_device([limit], flat),
                                             positions.numel(),
                                             BLOCK=BLOCK)
    return values


@triton.jit
def _amsgrad_kernel(w, gradient, moment, square, largest, constants, length, DECAYS: tl.constexpr,
                    BLOCK: tl.constexpr):
    """``hvd_ext.kernels.amsgrad.update``."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < length
    lr, beta1, fresh1 = tl.load(constants), tl.load(constants + 1), tl.load(constants + 2)
    beta2, fresh2, eps = tl.load(constants + 3), tl.load(constants + 4), tl.load(constants + 5)
    shrink, decay, sign = tl.load(constants + 6), tl.load(constants + 7), tl.load(constants + 8)
    weight = tl.load(w + places, mask=inside, other=0.0) * shrink
    g = tl.load(gradient + places, mask=inside, other=0.0) * sign
    if DECAYS:
        g = g + decay * weight
    m = tl.load(moment + places, mask=inside, other=0.0) * beta1 + fresh1 * g
    v = tl.load(square + places, mask=inside, other=0.0) * beta2 + fresh2 * g * g
    most = tl.load(largest + places, mask=inside, other=0.0)
    most = tl.where((most >= v) | (most != most), most, v)  # of a NaN and a number the NaN
    tl.store(moment + places, m, mask=inside)
    tl.store(square + places, v, mask=inside)
    tl.store(largest + places, most, mask=inside)
    tl.store(w + places, weight + lr * m / tl.sqrt(most + eps), mask=inside)


def update_amsgrad(w: torch.Tensor, gradient: torch.Tensor, moment: torch.Tensor, square: torch.Tensor,
                   largest: torch.Tensor, *, decay: float, lr: float, beta1: float, fresh1: float,
                   beta2: float,
                   fresh2: float, eps: float, shrink: float, sign: float) -> None:
    """One update of AMSGrad, in place but for the gradient: contiguous tensors of one shape and dtype."""
    if w.numel():
        constants = _on_device([lr, beta1, fresh1, beta2, fresh2, eps, shrink, decay, sign], w)
        _amsgrad_kernel[_grid_size(w)](w, gradient, moment, square, largest, constants, w.numel(),
                                       DECAYS=decay != 0, BLOCK=BLOCK)


def _grid_size(tensor: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), BLOCK),)


def _on_device(numbers: Sequence[Any], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers of the tensor's dtype: as arguments of a kernel they would all be float32.

    From pinned memory, so that the copy waits for nothing.
    """
    made = torch.tensor(numbers, dtype=like.dtype if dtype is None else dtype)
    return made.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else made

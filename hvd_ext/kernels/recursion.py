"""The delay-compensated sum of any number of rows, in one pass over them (DC-ASGD supplement, eq. 95)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_ext.kernels.compiler import BLOCK_NUMEL, array_at, compile_loop, fma

Array = NDArray[Any]


@compile_loop
def compensated_sum(rows: NDArray[np.intp], mean_square: Array, out: Array, start: int, stop: int, *,
                    adaptive: bool, cumulative: bool, decay: Any, fresh: Any, eps: Any, strength: Any,
                    divisor: Any) -> None:
    """Elements ``start`` to ``stop`` of ``out = sum_j c^j / divisor``.

    ``c^j = g^j + strength g^j g^j D``, D the sum before row j with ``cumulative``, else g^j; ``adaptive``
    divides it by ``sqrt(MeanSquare + eps)``, after ``MeanSquare <- decay MeanSquare + fresh g g``.

    Args:
        rows: (M,) addresses of rows of at least ``stop`` elements of ``out``'s dtype.
        mean_square: (n,), updated in place; any array of the dtype for a constant strength.
        out: (n,) float32 or float64; may be one of the rows.
        decay, fresh, eps, strength, divisor: scalars of that dtype; strength is negative.
    """
    total = np.empty(BLOCK_NUMEL, out.dtype)
    one = divisor / divisor
    for begin in range(start, stop, BLOCK_NUMEL):
        size = min(BLOCK_NUMEL, stop - begin)
        target = out[begin:begin + size]
        for number in range(rows.size):
            g = array_at(rows[number], stop, out)[begin:begin + size]
            first = number == 0
            if adaptive:
                ms = mean_square[begin:begin + size]
                if first and cumulative:
                    for i in range(size):
                        ms[i] = fma(fresh * g[i], g[i], ms[i] * decay)
                        total[i] = g[i]
                elif cumulative:
                    for i in range(size):
                        ms[i] = fma(fresh * g[i], g[i], ms[i] * decay)
                        scaled = g[i] * total[i] * (one / np.sqrt(ms[i] + eps))
                        total[i] = fma(strength * g[i], scaled, total[i] + g[i])
                else:
                    for i in range(size):
                        ms[i] = fma(fresh * g[i], g[i], ms[i] * decay)
                        scaled = g[i] * g[i] * (one / np.sqrt(ms[i] + eps))
                        total[i] = fma(strength * g[i], scaled, g[i] if first else total[i] + g[i])
            elif first and cumulative:
                for i in range(size):
                    total[i] = g[i]
            elif cumulative:
                for i in range(size):
                    total[i] = fma(strength * g[i], g[i] * total[i], total[i] + g[i])
            else:
                for i in range(size):
                    total[i] = fma(strength * g[i], g[i] * g[i], g[i] if first else total[i] + g[i])
        for i in range(size):
            target[i] = total[i] / divisor

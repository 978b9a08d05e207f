"""One update of the parameter server, in one pass over its arrays (DC-ASGD eq. 10, Algorithm 2)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_ext.kernels.compiler import BLOCK_NUMEL, compile_loop

Array = NDArray[Any]


@compile_loop
def update_weights(w: Array, gradient: Array, w_bak: Array, mean_square: Array, velocity: Array, *,
                   compensates: bool,
                   adaptive: bool, moves: bool, lr: Any, momentum: Any, lam: Any, decay: Any, fresh: Any,
                   eps: Any) -> None:
    """:func:`hvd_ext.reducers.delay_compensation.update_rules.apply_update`, bit for bit; then ``w_bak``
    holds the new weights too.

    Args:
        w, gradient, w_bak: (n,) of one dtype, float32 or float64.
        mean_square, velocity: the same; any array of the dtype where the rule or ``moves`` has no use for it.
        lr, momentum, lam, decay, fresh, eps: scalars of that dtype; ``fresh`` is 1 - decay.
    """
    step = np.empty(BLOCK_NUMEL, w.dtype)
    for begin in range(0, w.size, BLOCK_NUMEL):
        end = min(begin + BLOCK_NUMEL, w.size)
        size = end - begin
        now, old, g = w[begin:end], w_bak[begin:end], gradient[begin:end]
        if adaptive:
            ms = mean_square[begin:end]
            for i in range(size):
                square = g[i] * g[i]
                ms[i] = ms[i] * decay + square * fresh
                step[i] = ((now[i] - old[i]) * square / np.sqrt(ms[i] + eps) * lam + g[i]) * lr
        elif compensates:
            for i in range(size):
                step[i] = ((now[i] - old[i]) * (g[i] * g[i]) * lam + g[i]) * lr
        else:
            for i in range(size):
                step[i] = g[i] * lr
        if moves:
            v = velocity[begin:end]
            for i in range(size):
                v[i] = v[i] * momentum - step[i]
                now[i] += v[i]
                old[i] = now[i]
        else:
            for i in range(size):
                now[i] -= step[i]
                old[i] = now[i]

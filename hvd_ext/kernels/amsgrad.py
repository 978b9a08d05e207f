"""One update of AMSGrad, in one pass over its arrays (SPARS-AMS Algorithm 1, lines 13 to 16)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_ext.kernels.compiler import BLOCK_NUMEL, compile_loop, fma

Array = NDArray[Any]


@compile_loop
def update_amsgrad(w: Array, gradient: Array, moment: Array, square: Array, largest: Array, start: int,
                   stop: int, *,
                   lr: Any, beta1: Any, fresh1: Any, beta2: Any, fresh2: Any, eps: Any, shrink: Any,
                   decay: Any,
                   sign: Any) -> None:
    """Elements ``start`` to ``stop`` of flat arrays (n,) of one dtype, in place but for the gradient.

    Args:
        lr, beta1, beta2, eps: AMSGrad's, scalars of that dtype; lr is negative.
        fresh1, fresh2: 1 - beta.
        shrink: what the weights are multiplied by first, 1 for no decoupled weight decay.
        decay: how much of the weights is added to the gradient.
        sign: 1, or -1 to maximize.
    """
    root = np.empty(BLOCK_NUMEL, w.dtype)
    for begin in range(start, stop, BLOCK_NUMEL):
        end = min(begin + BLOCK_NUMEL, stop)
        size = end - begin
        weight, g, m = w[begin:end], gradient[begin:end], moment[begin:end]
        v, most = square[begin:end], largest[begin:end]
        # Several short loops: the compiler vectorises none that has five arrays.
        for i in range(size):
            weight[i] *= shrink
            root[i] = g[i] * sign
        if decay != 0:
            for i in range(size):
                root[i] = fma(decay, weight[i], root[i])
        for i in range(size):
            m[i] = fma(fresh1, root[i], m[i] * beta1)
            v[i] = fma(fresh2 * root[i], root[i], v[i] * beta2)
        for i in range(size):
            # Of a NaN and a number the NaN is the maximum.
            most[i] = most[i] if most[i] >= v[i] or most[i] != most[i] else v[i]
            root[i] = np.sqrt(most[i] + eps)
        for i in range(size):
            weight[i] += lr * m[i] / root[i]

"""SPARS-AMS Algorithms 1 and 2 in float64 NumPy, written from the paper, one step after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Gradient = Callable[[Vector, int, int], Vector]  # (weights, worker, step) -> gradient


def top_k(a: npt.NDArray, k: int) -> npt.NDArray[np.int64]:
    """Positions of the k largest magnitudes, equals by lowest position, zeros left out; rising."""
    order = np.lexsort((np.arange(len(a)), -np.abs(a)))
    return np.sort(np.array([i for i in order[:k] if a[i] != 0], dtype=np.int64))


def amsgrad_step(w: Vector, g: Vector, state: dict[str, Vector], *, lr: float, beta1: float,
                 beta2: float, eps: float) -> Vector:
    """Algorithm 1, lines 13 to 16."""
    state["m"] = beta1 * state["m"] + (1 - beta1) * g
    state["v"] = beta2 * state["v"] + (1 - beta2) * g * g
    state["vhat"] = np.maximum(state["vhat"], state["v"])
    return w - lr * state["m"] / np.sqrt(state["vhat"] + eps)


def algorithm_1(gradient: Gradient, w0: Vector, *, workers: int, steps: int,
                keep: Callable[[int], int], lr: float, beta1: float = 0.9, beta2: float = 0.999,
                eps: float = 1e-8, feedback: bool = True,
                pieces: Sequence[slice] | None = None) -> tuple[list[Vector], list[Vector]]:
    """The distributed method.

    Args:
        keep: k of n elements; called for each of ``pieces`` (one for all elements by default).
        feedback: False drops what is not sent.

    Returns:
        The weights after each step, and each worker's residual after the last.
    """
    w = w0.astype(np.float64).copy()
    state = {name: np.zeros_like(w) for name in ("m", "v", "vhat")}
    errors = [np.zeros_like(w) for _ in range(workers)]
    trajectory = []
    for step in range(steps):
        sent_by_all = []
        for worker in range(workers):
            a = gradient(w, worker, step) + errors[worker]
            sent = np.zeros_like(a)
            for piece in pieces if pieces is not None else [slice(0, len(a))]:
                chosen = top_k(a[piece], keep(len(a[piece]))) + piece.start
                sent[chosen] = a[chosen]  # line 7
            if feedback:
                errors[worker] = a - sent  # line 8
            sent_by_all.append(sent)
        mean = np.sum(sent_by_all, axis=0) / workers  # line 12
        w = amsgrad_step(w, mean, state, lr=lr, beta1=beta1, beta2=beta2, eps=eps)
        trajectory.append(w.copy())
    return trajectory, errors


def algorithm_2(gradient: Gradient, w0: Vector, *, steps: int, k: int, lr: float,
                beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> list[Vector]:
    """The single-machine method, written out by itself."""
    w = w0.astype(np.float64).copy()
    e, m, v, vhat = (np.zeros_like(w) for _ in range(4))
    trajectory = []
    for step in range(steps):
        g = gradient(w, 0, step)
        chosen = top_k(g + e, k)
        gt = np.zeros_like(w)
        gt[chosen] = (g + e)[chosen]  # line 5
        e = e + g - gt  # line 6
        m = beta1 * m + (1 - beta1) * gt
        v = beta2 * v + (1 - beta2) * gt**2
        vhat = np.maximum(v, vhat)
        w = w - lr * m / np.sqrt(vhat + eps)  # line 10
        trajectory.append(w.copy())
    return trajectory

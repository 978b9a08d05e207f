"""A server whose replies are compressed, in float64 NumPy: w on the owners, w^ on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tests.reference.spars_ams import top_k

Vector = npt.NDArray[np.float64]
Gradient = Callable[[Vector, int, int], Vector]  # (weights, worker, step) -> gradient
Update = Callable[[Vector, Vector], Vector]  # (w, gradient) -> new w; keeps its own state
Reply = Callable[[Vector], Vector]  # w - w^ -> what is sent of it


def train(gradient: Gradient, w0: Vector, update: Update, reply: Reply, *, workers: int, steps: int,
          keep: int | None = None) -> tuple[Vector, Vector]:
    """w and w^ after so many steps.

    Args:
        gradient: taken at w^.
        update: of the wrapped optimizer, given the mean gradient.
        keep: k of the workers' TopK with error feedback over all elements; None for plain means.
    """
    w, held = w0.copy(), w0.copy()
    errors = [np.zeros_like(w) for _ in range(workers)]
    for step in range(steps):
        sent = []
        for worker in range(workers):
            g = gradient(held, worker, step)
            if keep is not None:
                a = g + errors[worker]
                g = np.zeros_like(a)
                chosen = top_k(a, keep)
                g[chosen] = a[chosen]
                errors[worker] = a - g
            sent.append(g)
        w = update(w, np.sum(sent, axis=0) / workers)
        held = held + reply(w - held)
    return w, held


def topk_reply(parts: Sequence[npt.NDArray[np.int64]], whole: npt.NDArray[np.int64],
               keep: Callable[[int], int]) -> Reply:
    """What owners send who each choose among the positions of one part; ``whole`` ones are sent so."""
    def reply(difference: Vector) -> Vector:
        sent = np.zeros_like(difference)
        sent[whole] = difference[whole]
        for part in parts:
            if len(part):
                chosen = part[top_k(difference[part], keep(len(part)))]
                sent[chosen] = difference[chosen]
        return sent

    return reply


def half_reply(difference: Vector) -> Vector:
    """All of it, rounded to float16; by way of float32, as frameworks turn one into the other."""
    return difference.astype(np.float32).astype(np.float16).astype(np.float64)


def momentum(lr: float, mu: float) -> Update:
    """Polyak's."""
    velocity: list[Vector] = []

    def update(w: Vector, g: Vector) -> Vector:
        velocity[:] = [mu * velocity[0] + g if velocity else g.copy()]
        return w - lr * velocity[0]

    return update


def adam(lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Update:
    """Kingma and Ba's Algorithm 1."""
    state: dict[str, Vector] = {}
    steps = [0]

    def update(w: Vector, g: Vector) -> Vector:
        steps[0] += 1
        state["m"] = beta1 * state.get("m", np.zeros_like(w)) + (1 - beta1) * g
        state["v"] = beta2 * state.get("v", np.zeros_like(w)) + (1 - beta2) * g * g
        m, v = state["m"] / (1 - beta1 ** steps[0]), state["v"] / (1 - beta2 ** steps[0])
        return w - lr * m / (np.sqrt(v) + eps)

    return update

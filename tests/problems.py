"""What problems of both front ends are made of: shapes, and gradients that are known."""

from __future__ import annotations

import numpy as np

# No size divides by 2 or 4; a scalar, an empty tensor, tensors smaller than the number of ranks.
UNEVEN = [(7, 3), (5,), (), (1,), (0, 4), (33, 11), (3,), (2, 3, 5)]


def worker_gradients(shapes, *, worker, step, seed=0, scale=1.0):
    """The made gradients of one worker at one step, float64; workers differ in size and direction."""
    rng = np.random.default_rng([seed, worker, step])
    return [scale * (0.3 + rng.random()) * rng.standard_normal(shape) for shape in shapes]

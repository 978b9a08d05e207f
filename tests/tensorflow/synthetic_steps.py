"""Made gradients applied to tf.Variables: steps whose result the oracles know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tests.problems import worker_gradients


def make_variables(shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[tf.Variable]:
    """Variables with the values of ``tests.torch.problems.make_parameters``."""
    rng = np.random.default_rng(seed)
    return [tf.Variable(rng.standard_normal(shape).astype("float32"), name=f"p{number}")
            for number, shape in enumerate(shapes)]


def flat(tensors: Sequence[Any]) -> np.ndarray:
    """One float64 vector of all."""
    return np.concatenate([np.asarray(t, np.float64).ravel() for t in tensors])


def run_steps(optimizer: Any, variables: list[tf.Variable], worker: int, steps: int, *,
              compiled: bool, passes: int = 1, first: int = 0,
              change: Callable[[int, list[Any]], list[Any]] | None = None) -> list[np.ndarray]:
    """Apply made gradients; the flat weights after each step.

    Micro-batch j of a rank with ``passes`` > 1 has the gradient of worker ``worker * passes + j``.
    """
    shapes = [tuple(variable.shape) for variable in variables]

    def apply(*gradients: tf.Tensor) -> None:
        optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))

    run = tf.function(apply) if compiled else apply
    seen = []
    for step in range(first, first + steps):
        for part in range(passes):
            made = worker_gradients(shapes, worker=worker * passes + part, step=step)
            gradients = [tf.constant(g, tf.float32) for g in made]
            run(*(gradients if change is None else change(step, gradients)))
        seen.append(flat(variables))
    return seen

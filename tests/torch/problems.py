"""Small training problems whose gradients are known, for tests on any number of ranks."""

from __future__ import annotations

import numpy as np
import torch

from tests.problems import UNEVEN, worker_gradients

__all__ = ["UNEVEN", "worker_gradients"]

def make_parameters(shapes=UNEVEN, *, seed=0, dtype=torch.float32):
    """Parameters with values that are alike on every rank."""
    rng = np.random.default_rng(seed)
    return [torch.nn.Parameter(torch.from_numpy(rng.standard_normal(shape)).to(dtype))
            for shape in shapes]


def named(parameters):
    """Names p0, p1, ..."""
    return [(f"p{i}", p) for i, p in enumerate(parameters)]


def backward(parameters, gradients, *, reverse=False, skip=()):
    """A backward pass that gives ``gradients``; ``reverse`` makes the hooks fire the other way round."""
    pairs = [(p, g) for i, (p, g) in enumerate(zip(parameters, gradients, strict=True))
             if i not in skip]
    # Separate passes fix the order in which hooks fire.
    for p, g in reversed(pairs) if reverse else pairs:
        (p * torch.as_tensor(np.asarray(g)).to(p.dtype)).sum().backward()


def flat(tensors):
    """One float64 NumPy vector of all."""
    parts = [t.detach().double().cpu().numpy().ravel() if isinstance(t, torch.Tensor)
             else np.asarray(t, np.float64).ravel() for t in tensors]
    return np.concatenate(parts) if parts else np.zeros(0)


def bits(tensors):
    """The bytes of all tensors, to compare replicas bit by bit."""
    return b"".join(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                    for t in tensors if t.numel())

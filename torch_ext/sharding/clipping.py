"""Clipping by the norm of all gradients, wherever they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hvd_ext.torch.async_d2h import on_host
from hvd_ext.torch.reducers.base import Reducer
from hvd_ext.torch.step import DistributedStep


def clip_grad_norm_(optimizer: torch.optim.Optimizer, max_norm: float,
                    norm_type: float = 2.0) -> torch.Tensor:
    """Scale the reduced gradients so that their norm together is at most ``max_norm``.

    Call it on every rank between ``loss.backward()`` and ``optimizer.step()``. It reduces the gradients,
    unless ``optimizer.synchronize()`` has, and ``step()`` does not again. What
    ``torch.nn.utils.clip_grad_norm_`` does, up to rounding; under ``server="sharded"`` each rank takes the
    norm of what it owns and the ranks exchange one number.

    Args:
        optimizer: what ``hvd.DistributedOptimizer`` returned.
        max_norm: the largest norm allowed.
        norm_type: p of the p-norm, above 0; ``math.inf`` for the largest magnitude.

    Returns:
        The norm before clipping, 0-D; the same bits on every rank.

    Raises:
        TypeError: the optimizer is not a DistributedOptimizer, or is Horovod's own (Adasum, LBFGS).
        ValueError: ``max_norm`` or ``norm_type`` is outside its limits.
    """
    wrapper = getattr(optimizer, "_hvd_ext", None)
    if wrapper is None:
        raise TypeError(f"{type(optimizer).__name__} is not an optimizer of hvd.DistributedOptimizer, or is "
                        "Horovod's own; call optimizer.synchronize(), torch.nn.utils.clip_grad_norm_(), and "
                        "step() within optimizer.skip_synchronize()")
    max_norm, norm_type = float(max_norm), float(norm_type)
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    if not norm_type > 0:
        raise ValueError(f"norm_type must be above 0, got {norm_type}; 2 for the Euclidean norm")
    wrapper.synchronize(settle=True)
    return clip_reduced_gradients(wrapper, max_norm, norm_type)


def clip_reduced_gradients(wrapper: DistributedStep, max_norm: float, norm_type: float) -> torch.Tensor:
    """The same for gradients that are reduced."""
    reducer, optimizer = wrapper.reducer, wrapper.optimizer
    if reducer.owner_only and wrapper.uneven is not None:
        wrapper.uneven.clipping_follows(max_norm, norm_type)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    with torch.no_grad():
        total = (_norm_over_ranks(reducer, norm_type) if reducer.owner_only
                 else float(_total_norm(gradients, norm_type)))
        factor = min(1.0, max_norm / (total + 1e-6)) if not math.isnan(total) else math.nan
        if factor != 1.0:
            for gradient in gradients:
                gradient.mul_(factor)
    return torch.tensor(total, dtype=gradients[0].dtype, device=gradients[0].device)


def _total_norm(gradients: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    """The p-norm of all of them together, 0-D float64 on the CPU."""
    values = [one.coalesce().values() if one.is_sparse else one for one in gradients]
    norms = [one.double() for one in on_host(
        torch.linalg.vector_norm(one, norm_type) for one in values if one.numel())]
    return torch.linalg.vector_norm(torch.stack(norms or [torch.zeros((), dtype=torch.float64)]), norm_type)


def _norm_over_ranks(reducer: Reducer, norm_type: float) -> float:
    """The norm of what all ranks own; each adds up the same numbers in the same order."""
    mine = _total_norm(reducer.owned_gradients(), norm_type)
    everyone = reducer.collectives.allgather_async(mine.reshape(1), "hvd_ext/clip", kind="agreement").wait()
    return float(torch.linalg.vector_norm(everyone, norm_type))

"""Which rank owns which parameter, balanced by size or cost, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

EVERY_RANK = -1


def assign_owners(numels: Sequence[int], ranks: int, loads: Sequence[int] | None = None) -> list[int]:
    """An owner for each parameter: the largest first, each to the rank that has least.

    Args:
        numels: elements of each parameter, or what its update costs.
        ranks: M.
        loads: the sum of these that each rank owns already.

    Returns:
        The owner of each parameter, in the order of ``numels``.
    """
    held = list(loads) if loads is not None else [0] * ranks
    result = [0] * len(numels)
    for index in sorted(range(len(numels)), key=lambda index: (-numels[index], index)):
        rank = min(range(ranks), key=lambda rank: (held[rank], rank))
        result[index] = rank
        held[rank] += numels[index]
    return result


def orthogonalising_cost(shape: Sequence[int]) -> int:
    """What Muon's update of a matrix costs: products of the smaller side's square with the larger one.

    Newton-Schulz works on ``min(m, n) × min(m, n)``; other shapes cost their elements.
    """
    if len(shape) != 2:
        return prod(shape)
    return min(shape) ** 2 * max(shape)


def plan_owners(server: str, numels: Sequence[int], ranks: int,
                loads: Sequence[int] | None = None) -> list[int]:
    """The owner of each parameter under a server: a rank, or ``EVERY_RANK``."""
    if server == "replicated":
        return [EVERY_RANK] * len(numels)
    if server == "rank0":
        return [0] * len(numels)
    return assign_owners(numels, ranks, loads)


def owned_elements(owned: Sequence[int], numels: Sequence[int], ranks: int) -> list[int]:
    """Elements of which each rank keeps the optimizer's state."""
    held = [0] * ranks
    for owner, numel in zip(owned, numels, strict=True):
        for rank in range(ranks) if owner == EVERY_RANK else (owner,):
            held[rank] += numel
    return held

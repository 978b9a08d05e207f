"""What ranks compare before an optimizer's first exchange, and what becomes of a difference.

Each rank offers all its optimizers that have not been compared yet, so that ranks which begin with another
one still agree. Equal offers are seen in one small sum (``checksum.py``); only where they differ do the
ranks exchange them and :func:`compare_offers` them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvd_ext.consistency.fingerprint import digest_parts, mismatch_message, mismatched_ranks

CHECK_WEIGHTS = "HVD_EXT_CHECK_WEIGHTS"
SETTINGS_DIFFER = "the ranks do not train the same parameters in the same way"
BROADCAST = ("call hvd.broadcast_parameters(model.state_dict(), root_rank=0), or give "
             "hvd.DistributedOptimizer broadcast_weights=True")
REMEDY = "Build the same model and optimizer on every rank"


def checks_weights() -> bool:
    """Whether replicas must begin with the same weights: yes, unless the environment says otherwise."""
    return os.environ.get(CHECK_WEIGHTS, "1") != "0"


@dataclass(frozen=True)
class Offer:
    """An optimizer of one rank, as ranks compare it.

    Attributes:
        lines: its settings and parameters.
        weights: a number for each parameter's name, of its bits; empty where weights are not compared.
    """

    lines: tuple[str, ...]
    weights: tuple[tuple[str, int], ...] = ()

    @property
    def number(self) -> int:
        """62 bits in place of the offer."""
        return digest_parts(self.lines, self.weights)


@dataclass(frozen=True)
class Offers:
    """What a rank offers: its optimizers by scope, and the one whose step it is."""

    current: str
    optimizers: Mapping[str, Offer]

    @property
    def number(self) -> int:
        """62 bits in place of all offers."""
        return digest_parts(sorted((scope, offer.number) for scope, offer in self.optimizers.items()))


def compare_offers(everyone: Sequence[Offers]) -> tuple[str | None, set[str]]:
    """What all ranks make of their offers.

    Args:
        everyone: the ranks' offers, by rank.

    Returns:
        The message of the error that every rank raises, or None; and the scopes that the ranks agree on.
    """
    for scope in sorted({offers.current for offers in everyone}):
        # In place of an optimizer that a rank does not have, the one that it begins with is compared.
        by_rank = [offers.optimizers.get(scope, offers.optimizers[offers.current]) for offers in everyone]
        if mismatched_ranks([offer.lines for offer in by_rank]):
            return mismatch_message(SETTINGS_DIFFER, [offer.lines for offer in by_rank], REMEDY), set()
        if mismatched_ranks([offer.weights for offer in by_rank]):
            return weights_differ([offer.weights for offer in by_rank], BROADCAST), set()
    first = everyone[0].optimizers
    return None, {scope for scope, offer in first.items()
                  if all(offers.optimizers.get(scope) == offer for offers in everyone)}


def weights_differ(by_rank: Sequence[Sequence[tuple[str, int]]], remedy: str) -> str:
    """The message of the error for replicas that begin with other weights than rank 0's.

    Args:
        by_rank: each rank's weights by name, as numbers.
        remedy: what to call before the first step, as a clause.
    """
    odd = mismatched_ranks(list(by_rank))
    names = [name for rank in odd for (name, mine), (_, theirs)
             in zip(by_rank[0], by_rank[rank], strict=True) if mine != theirs]
    names = list(dict.fromkeys(names))
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"the replicas begin with different weights: {listed} on rank{'s' * (len(odd) > 1)} "
        f"{', '.join(map(str, odd[:8]))} differ from rank 0's. Before the first step {remedy}; "
        f"if they are meant to differ, set {CHECK_WEIGHTS}=0")

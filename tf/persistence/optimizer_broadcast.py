"""State that the root's file gave to some or all ranks: what is shared is broadcast, the rest begins new.

Scripts for Horovod load rank 0's file, on rank 0 or on every rank, and broadcast. What an extension keeps on
each rank (residuals, slices of MeanSquare) is in that file for rank 0 only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvd_ext.state import SHARED, dropped_message
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.persistence.elastic_snapshot import optimizers_of


@dataclass(frozen=True)
class Progress:
    """Where a rank's optimizer is.

    Attributes:
        loaded: whose state a file gave since the last update: "own", "new" (of another rank, or of none);
            None where nothing was loaded.
        counters: numbers that are equal on ranks that may go on together.
        kept: what the extensions keep on this rank, for a message.
        server: its ``server=``, where moments are owned by some ranks.
    """

    loaded: str | None
    counters: tuple[int, ...]
    kept: tuple[str, ...]
    server: str | None


def begin_alike(variables: Sequence[Any], root_rank: int, ranks: Collectives,
                broadcast: Callable[[], None]) -> None:
    """Broadcast variables; where ranks were at different points, what each keeps of its own begins new.

    Args:
        variables: what is broadcast.
        root_rank: for the message.
        ranks: that take part.
        broadcast: does it.

    Raises:
        ValueError: on every rank: moments under ``server=`` that only some ranks have loaded.
    """
    optimizers = [] if ranks.is_elastic or ranks.size == 1 else optimizers_of(variables)
    if not optimizers:
        broadcast()
        return
    everyone = ranks.allgather_object([_describe_progress(one) for one in optimizers], "optimizer_progress")
    found = [[one for one in by_rank if one is not None] for by_rank in zip(*everyone, strict=True)]
    for by_rank in found:
        _check_owners(by_rank)
    broadcast()
    for optimizer, by_rank in zip(optimizers, found, strict=True):
        if optimizer._hvd_ext.collectives.is_member:
            _begin_new(optimizer, by_rank, root_rank)
        optimizer._hvd_ext.loaded = None


def _begin_new(optimizer: Any, by_rank: Sequence[Progress], root_rank: int) -> None:
    """Drop what each rank keeps if they are at different points; one of them warns."""
    if len({(one.loaded, one.counters) for one in by_rank}) == 1:
        return
    optimizer.reset_per_rank_state()
    dropped = sorted({label for one in by_rank for label in one.kept})
    tells = optimizer._hvd_ext.collectives.rank == 0
    if dropped and tells and any(one.loaded is None for one in by_rank):  # else who loaded has told it
        warnings.warn(dropped_message(dropped, (
            "broadcast_variables has found the ranks at different points of training and brought all of them "
            f"to rank {root_rank}'s")), stacklevel=4)


def _describe_progress(optimizer: Any) -> Progress | None:
    """None on a rank outside of the optimizer's process set, which trains alone."""
    if not optimizer._hvd_ext.collectives.is_member:
        return None
    wrapper, updates = optimizer._hvd_ext, int(optimizer.iterations)
    reducer, counters, kept = wrapper.reducer, [updates], []
    for one in reducer.declared_state():
        if one.part.scope == SHARED and one.variable.dtype.is_integer:
            counters.append(int(one.variable))
        elif one.part.scope != SHARED and one.part.label and np.any(one.variable.numpy()):
            kept.append(one.part.label)
    here = [wrapper.collectives.rank, wrapper.collectives.size]
    kind, at = wrapper.loaded or (None, updates)
    if reducer.stamp is not None and [*reducer.stamp.numpy()] != here:  # tf.train.Checkpoint
        kind, at = "new", updates
    return Progress(kind if at == updates else None, tuple(counters), tuple(kept),
                    None if wrapper.server is None else wrapper.where)


def _check_owners(by_rank: Sequence[Progress]) -> None:
    server = by_rank[0].server if by_rank else None
    if server is not None and len({(one.loaded, one.counters[0]) for one in by_rank}) > 1:
        raise ValueError(
            f"under server={server!r} each rank keeps the optimizer state of what it owns, and only some "
            "ranks have loaded it: write one file with hvd.save_model, called on every rank, and read it "
            "with hvd.load_model on every rank before the broadcast; or use hvd.save_checkpoint and "
            "hvd.load_checkpoint")

"""The state of a reducer from the files of all ranks that saved it, however many there are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hvd_ext.reducers.buckets import slice_sizes
from hvd_ext.reducers.error_feedback import RESIDUAL
from hvd_ext.reducers.topk import OWNER_RESIDUAL
from hvd_ext.state import GATHER, KEEP, MEAN
from hvd_ext.tensorflow.reducers.base import Reducer
from hvd_ext.tensorflow.reducers.declared_state import StateVariable

Arrays = Mapping[str, np.ndarray]


def join_state(reducer: Reducer, saved: Sequence[Arrays]) -> list[tuple[Any, np.ndarray]]:
    """The variables of the state with the values that this rank goes on from.

    Args:
        reducer: the one that takes them.
        saved: by rank, the arrays of its state by name.

    Raises:
        ValueError: they are of another model or other settings.
    """
    return [(one.variable, _join(reducer, one, saved)) for one in reducer.declared_state()]


def _join(reducer: Reducer, one: StateVariable, saved: Sequence[Arrays]) -> np.ndarray:
    shape, dtype = tuple(one.variable.shape), one.variable.dtype.as_numpy_dtype
    found = [file[one.name] for file in saved if one.name in file]
    if not found or one.part.resize not in (KEEP, MEAN, GATHER):
        value = np.zeros(shape, dtype)
    elif one.part.resize == KEEP:
        value = found[0]
    elif one.part.resize == MEAN:
        value = np.mean(found, axis=0, dtype=np.float64)
    else:
        value = _cut(reducer, one, found)
    if one.part is RESIDUAL:  # an owner's counts whole in the mean, these 1/M on each of M ranks
        owned = f"{OWNER_RESIDUAL.name}_{one.number}"
        value = value + sum(file[owned].astype(np.float64) for file in saved if owned in file)
    if value.shape != shape:
        raise ValueError(f"{one.name} has shape {value.shape} in the checkpoint and {shape} here; build the "
                         "model and optimizer that were saved, or pass reset_per_rank_state=True to begin "
                         "without what the extensions keep")
    return value.astype(dtype)


def _cut(reducer: Reducer, one: StateVariable, found: Sequence[np.ndarray]) -> np.ndarray:
    """This rank's slice of a whole, of which each rank saved its own; under elastic there is room for all."""
    pieces = list(found)
    if all(len(piece) == one.whole for piece in found):
        cuts = np.cumsum([0, *slice_sizes(one.whole, len(found))])
        pieces = [piece[low:high] for piece, low, high in zip(found, cuts, cuts[1:], strict=False)]
    whole = np.concatenate(pieces)
    if len(whole) == one.variable.shape[0]:
        return whole
    ranks, rank = max(1, reducer.collectives.size), max(0, reducer.collectives.rank)
    cuts = np.cumsum([0, *slice_sizes(len(whole), ranks)])
    return whole[cuts[rank]:cuts[rank + 1]]

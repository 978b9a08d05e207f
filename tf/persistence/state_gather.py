"""The plain optimizer's state from the ranks that keep it, complete on rank 0, in a few messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_ext.reducers.buckets import DEFAULT_BUCKET_BYTES
from hvd_ext.sharding.ownership import EVERY_RANK
from hvd_ext.tensorflow.belonging import BESIDE, ONCE, whole_shape
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.persistence.keras_checkpoint_layout import (
    ACCUMULATOR,
    plain_variables,
    refuse_per_rank_state,
)
from hvd_ext.tensorflow.variables import as_tf


def gather_values(optimizer: Any, *, reset_per_rank_state: bool = False) -> dict[str, Any]:
    """The plain optimizer's state, whichever ranks keep it: by number, on rank 0. A collective.

    Raises:
        ValueError: on all ranks, for state that belongs to each rank and has no place in it, or
            whose owner is not known.
    """
    wrapper = optimizer._hvd_ext
    refuse_per_rank_state(optimizer, reset_per_rank_state)
    collectives = Collectives(wrapper.collectives.process_set)  # not part of a step's bytes
    variables = [as_tf(one) for one in plain_variables(optimizer)]
    values: dict[int, Any] = {}
    if collectives.size > 1:
        kinds = [wrapper.references.get(id(one), (None, "")) for one in variables]
        accumulated = [one for one, (_, kind) in zip(variables, kinds, strict=True) if kind == ACCUMULATOR]
        found = _mean_over_ranks(accumulated, collectives, wrapper.reducer.prefix)
        if wrapper.server is not None:
            found.update(_gather_owned(optimizer, variables, collectives))
        values = {number: found[id(one)] for number, one in enumerate(variables) if id(one) in found}
    if collectives.rank:
        return {}
    return {str(number): values[number] if number in values else one.numpy()
            for number, one in enumerate(variables)}


def _mean_over_ranks(variables: Sequence[tf.Variable], collectives: Collectives, prefix: str
                     ) -> dict[int, Any]:
    """By id: gradients that Keras has accumulated; of equal ones on all ranks the mean is the same."""
    found: dict[int, Any] = {}
    for dtype in dict.fromkeys(one.dtype for one in variables):
        mine = [one for one in variables if one.dtype == dtype]
        sizes = [int(one.shape.num_elements()) * dtype.size for one in mine]
        for number, places in enumerate(_plan_messages(sizes)):
            flat = tf.concat([tf.reshape(mine[place].read_value(), [-1]) for place in places], axis=0)
            mean = collectives.allreduce(flat, f"{prefix}/accumulated/{dtype.name}.{number}").numpy()
            ends = np.cumsum([sizes[place] // dtype.size for place in places])
            for place, part in zip(places, np.split(mean, ends[:-1]), strict=True):
                found[id(mine[place])] = part.reshape(mine[place].shape)
    return found


def _gather_owned(optimizer: Any, variables: Sequence[tf.Variable], collectives: Collectives
                  ) -> dict[int, Any]:
    """By id, on rank 0: what ``server=`` has one rank, or each a piece, keep up to date.

    Raises:
        ValueError: on all ranks: a variable that belongs to no one variable of the model differs by rank.
    """
    wrapper = optimizer._hvd_ext
    server, prefix = wrapper.server, wrapper.reducer.prefix
    sent, alike = [], []
    for one in variables:
        reference, kind = wrapper.references.get(id(one), (None, ""))
        if kind == ACCUMULATOR:
            continue
        if reference is None:
            alike.append((one, kind))
        elif kind != BESIDE and server.is_cut(reference):
            sent.append((one, one.numpy(), tuple(reference.shape)))
        elif server.owner_of(reference) != EVERY_RANK:
            own = server.owner_of(reference) == collectives.rank
            sent.append((one, one.numpy() if own else np.zeros(0, one.dtype.as_numpy_dtype),
                         whole_shape(optimizer, one)))
    everyone = collectives.allgather_object(([own.nbytes for _, own, _ in sent],
                                             [one.numpy().tobytes() for one, _ in alike]), f"{prefix}/saved")
    found: dict[int, Any] = {}
    for number, (one, kind) in enumerate(alike):
        kept = [everyone[rank][1][number] for rank in (server.busy if kind == ONCE else range(len(everyone)))]
        if any(other != kept[0] for other in kept):
            raise ValueError(
                f"{one.name} of {type(optimizer).__name__} differs by rank and belongs to no one variable, "
                f"so that server={server.kind!r} cannot bring it together; save one file per rank with "
                "model.save, or use server='replicated'")
        found[id(one)] = np.frombuffer(kept[0], one.dtype.as_numpy_dtype).reshape(one.shape)
    by_rank = np.array([sizes for sizes, _ in everyone], np.int64).reshape(len(everyone), len(sent))
    for number, places in enumerate(_plan_messages(by_rank.sum(axis=0).tolist())):
        mine = b"".join(sent[place][1].tobytes() for place in places)
        gathered = collectives.allgather(tf.constant(np.frombuffer(mine, np.uint8)),
                                         f"{prefix}/saved{number}", kind="objects").numpy().tobytes()
        found.update(_split_message(gathered, [sent[place] for place in places], by_rank[:, places]))
    return found


def _split_message(gathered: bytes, sent: Sequence[tuple[tf.Variable, Any, tuple[int, ...]]],
                   by_rank: np.ndarray) -> dict[int, Any]:
    """By id, the variables of a message: ``by_rank`` has each rank's bytes of each, (ranks, variables)."""
    ends = np.cumsum(by_rank.ravel()).reshape(by_rank.shape)
    return {id(one): np.frombuffer(b"".join(gathered[end - size:end] for end, size in zip(
                ends[:, place], by_rank[:, place], strict=True)), one.dtype.as_numpy_dtype).reshape(shape)
            for place, (one, _, shape) in enumerate(sent)}


def _plan_messages(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Places of what travels together: as many as fit into a bucket."""
    places: list[int] = []
    total = 0
    for place, size in enumerate(sizes):
        if places and total + size > DEFAULT_BUCKET_BYTES:
            yield places
            places, total = [], 0
        places.append(place)
        total += size
    if places:
        yield places

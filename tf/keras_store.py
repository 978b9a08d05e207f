"""The optimizer's state across ranks: one file in the plain optimizer's layout, and back.

A distributed optimizer's variables are those of the plain one, in its order, and after them what
the extensions keep. Under ``server="rank0"`` and ``"sharded"`` some of the first are empty on the
ranks that do not own them. ``gather`` brings the plain ones together, ``load`` takes either layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_ext.servers.ownership import EVERY_RANK
from hvd_ext.tensorflow.belonging import BESIDE, ONCE, whole_shape
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.variables import as_tf, is_per_rank, name_of

IN_PLACE = "_hvd_ext_saved"
WAITING = "_hvd_ext_waiting"  # values given before there were variables to hold them
ACCUMULATOR = "gradient_accumulator"  # Keras' sums of this rank's gradients, not yet reduced


def gather(optimizer: Any, *, reset_per_rank_state: bool = False) -> dict[str, Any]:
    """The plain optimizer's state, whichever ranks keep it: complete on rank 0. A collective.

    Raises:
        ValueError: on all ranks, for state that belongs to each rank and has no place in it, or
            whose owner is not known.
    """
    wrapper = optimizer._hvd_ext
    refuse_per_rank_state(optimizer, reset_per_rank_state)
    collectives = Collectives(wrapper.collectives.process_set)  # not part of a step's bytes
    values: dict[str, Any] = {}
    for number, variable in enumerate(plain_variables(optimizer)):
        value = _value(optimizer, as_tf(variable), collectives, f"{wrapper.options.prefix}/{number}")
        if collectives.rank == 0:
            values[str(number)] = value
    return values


def _value(optimizer: Any, variable: tf.Variable, collectives: Collectives, name: str) -> Any:
    server = optimizer._hvd_ext.server
    reference, kind = optimizer._hvd_ext.references.get(id(variable), (None, ""))
    own = variable.numpy()
    if collectives.size == 1:
        return own
    if kind == ACCUMULATOR:  # of equal gradients on all ranks, the mean would be the same
        return collectives.allreduce(variable.read_value(), f"{name}/accumulated").numpy()
    if server is None:
        return own
    if reference is not None and kind != BESIDE and server.is_cut(reference):
        pieces = collectives.allgather(tf.reshape(variable, [-1]), f"{name}/pieces", kind="objects")
        return pieces.numpy().reshape(tuple(reference.shape))
    owner = EVERY_RANK if reference is None else server.owner(reference)
    if owner == EVERY_RANK:
        everyone = collectives.allgather_object(own.tobytes(), f"{name}/identical")
        kept = [everyone[rank] for rank in server.busy] if kind == ONCE else everyone
        if reference is None and any(other != kept[0] for other in kept):
            raise ValueError(
                f"{variable.name} of {type(optimizer).__name__} differs by rank and belongs to no "
                f"one variable, so that server={server.kind!r} cannot bring it together; save one "
                "file per rank with model.save, or use server='replicated'")
        return np.frombuffer(kept[0], own.dtype).reshape(own.shape)
    if owner != collectives.rank:
        own = np.zeros(whole_shape(optimizer, variable), variable.dtype.as_numpy_dtype)
    return collectives.broadcast(tf.constant(own, variable.dtype), owner, f"{name}/state").numpy()


@contextlib.contextmanager
def saving(optimizer: Any, values: dict[str, Any]) -> Iterator[None]:
    """Keras saves these values in place of the optimizer's variables until the block ends."""
    object.__setattr__(optimizer, IN_PLACE, values)
    try:
        yield
    finally:
        object.__delattr__(optimizer, IN_PLACE)


class Saved:
    """A value under the name of its variable, as the .h5 format asks a variable for both."""

    def __init__(self, path: str, value: Any) -> None:
        self.path = path
        self._value = value

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        del copy
        return np.asarray(self._value, dtype)


def in_place(optimizer: Any, variables: list[Any]) -> list[Any]:
    """The optimizer's variables; inside of :func:`saving` the values that stand for them."""
    values = optimizer.__dict__.get(IN_PLACE)
    if values is None:
        return variables
    return [Saved(variables[int(number)].path, value) for number, value in values.items()]


def set_weights(optimizer: Any, weights: Sequence[Any], set_all: Callable[[Any], None]) -> None:
    """What :func:`load` does, for Keras' ``set_weights``.

    Raises:
        RuntimeError: as the errors of ``load``. Reading an .h5 file, Keras takes a ValueError for a
            reason to go on without the state, on this rank alone.
    """
    wrapper = optimizer._hvd_ext
    if not optimizer.built:
        optimizer.__dict__[WAITING] = [np.array(weight) for weight in weights]  # the file is closed soon
        return
    if wrapper.plain_count in (None, len(optimizer.variables)):
        set_all(weights)
        return
    store = {str(number): value for number, value in enumerate(weights)}
    try:
        load(optimizer, store, lambda values: set_all([values[key] for key in store]))
    except ValueError as error:
        raise RuntimeError(str(error)) from error


def set_waiting_weights(optimizer: Any) -> None:
    """Set what ``set_weights`` was given before the optimizer was built."""
    weights = optimizer.__dict__.pop(WAITING, None)
    if weights is not None:
        optimizer.set_weights(weights)


def save(optimizer: Any, store: Any, save_all: Callable[[Any], None]) -> None:
    """What Keras asks an optimizer for: its variables, or the values of :func:`saving`."""
    values = optimizer.__dict__.get(IN_PLACE)
    if values is None:
        save_all(store)
        return
    for number, value in values.items():
        store[number] = value


def plain_variables(optimizer: Any) -> list[Any]:
    """Those of a distributed optimizer's variables that the wrapped one has too."""
    return list(optimizer.variables)[:optimizer._hvd_ext.plain_count]


def refuse_per_rank_state(optimizer: Any, reset: bool) -> None:
    """Refuse to leave out what belongs to each rank, unless ``reset``.

    Raises:
        ValueError: there is such state.
    """
    wrapper = optimizer._hvd_ext
    if wrapper.counter is not None and int(wrapper.counter):
        raise ValueError(
            f"{int(wrapper.counter)} of backward_passes_per_step={wrapper.options.passes} passes "
            "are done and their gradients belong to each rank; save after a whole step")
    if wrapper.reducer.per_rank_state() and not reset:
        what = type(wrapper.reducer).__name__.removesuffix("Reducer")
        raise ValueError(
            f"{what} keeps state that belongs to each rank, which one file for all has no place "
            "for: save one file per rank with model.save, or pass reset_per_rank_state=True to leave "
            "it out, so that it starts anew when the file is loaded")


def load(optimizer: Any, store: Any, load_all: Callable[[Any], None]) -> None:
    """Take back what a file holds; state of one rank only on that rank.

    Args:
        optimizer: distributed.
        store: arrays by number, in this optimizer's layout or the plain one's.
        load_all: the wrapped class's own loading, of all variables.

    Raises:
        ValueError: the file is another rank's, or of other extensions.
    """
    wrapper, variables = optimizer._hvd_ext, optimizer.variables
    count, plain = len(store.keys()), wrapper.plain_count
    if plain is None or plain == len(variables):
        load_all(store)  # Keras says why where it loads nothing
        return
    if count == plain:
        load_plain(optimizer, store)
        return
    if count != len(variables):
        raise ValueError(
            f"the file holds {count} variables of an optimizer; {optimizer.name!r} has {plain}, and "
            f"{len(variables) - plain} of its extensions: it was saved with another op=, "
            "compression= or server=, or for another model. A file written with hvd.save_model "
            "loads under every server= and on any number of ranks")
    values = {key: store[key] for key in list(store.keys())}
    for number, variable in enumerate(variables):
        own = as_tf(variable)
        if own is wrapper.server_stamp:
            check_stamp(values[str(number)], wrapper.collectives, "server=")
        elif wrapper.reset_per_rank_state and wrapper.server is None \
                and is_per_rank(variable):
            values[str(number)] = np.asarray(own)
        elif own is wrapper.reducer.stamp:
            check_stamp(values[str(number)], wrapper.collectives)
    load_all(values)


def load_plain(optimizer: Any, store: Any) -> None:
    """A file without extensions: this rank takes what it owns, the extensions start anew."""
    wrapper = optimizer._hvd_ext
    plain = plain_variables(optimizer)
    for number, variable in enumerate(plain):
        reference, kind = wrapper.references.get(id(as_tf(variable)), (None, ""))
        elsewhere = wrapper.server is not None and reference is not None \
            and kind != ACCUMULATOR and not wrapper.server.owns(reference)
        saved, here = np.asarray(store[str(number)]), as_tf(variable)
        piece = None if wrapper.server is None or reference is None or kind in (ACCUMULATOR, BESIDE) \
            else wrapper.server.stand_ins.piece(reference)
        expected = whole_shape(optimizer, variable)
        if saved.shape != expected:
            raise ValueError(f"the file's state {number} is of shape {saved.shape}, that of "
                             f"{name_of(variable)} of {expected}: it is of another model or optimizer")
        if not elsewhere:
            here.assign(saved if piece is None
                        else saved.reshape(-1)[piece.start : piece.stop].reshape(here.shape))
    for variable in list(optimizer.variables)[len(plain):]:
        as_tf(variable).assign(tf.zeros_like(as_tf(variable)))
    wrapper.stamp_rank()


def check_stamp(saved: Any, collectives: Collectives, what: str = "") -> None:
    """Refuse state that was saved by another rank, or on another number of ranks.

    Args:
        saved: the (rank, ranks) that the file holds.
        what: the argument whose state cannot be started anew, if that is so.

    Raises:
        ValueError: the state is another rank's.
    """
    rank, ranks = (int(number) for number in np.asarray(saved))
    if (rank, ranks) == (collectives.rank, collectives.size):
        return
    way = "save one for all with hvd.save_model" if what else "start that state anew with " \
        "reset_per_rank_state=True"
    raise ValueError(
        f"the optimizer's state in the file is that of rank {rank} of {ranks}, this is rank "
        f"{collectives.rank} of {collectives.size}: save and load one file per rank, or {way}")

"""The optimizer's state across ranks: one file in the plain optimizer's layout, and back.

A distributed optimizer's variables are those of the plain one, in its order, and after them what
the extensions keep. Under ``server="rank0"`` and ``"sharded"`` some of the first are empty on the
ranks that do not own them. ``state_gather.py`` brings the plain ones together, ``load_variables``
takes either layout.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_ext import state
from hvd_ext.checkpoint.layout import (
    KEY,
    SERVER_STAMP,
    STAMP,
    Layout,
    check_server,
    common_names,
    dropped_message,
)
from hvd_ext.state import SHARED
from hvd_ext.tensorflow.belonging import BESIDE, whole_shape
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.variables import as_tf, is_per_rank, name_of

FROM_THE_START = 2  # variables that an optimizer has before it is built: iterations, learning rate
IN_PLACE = "_hvd_ext_saved"
WAITING = "_hvd_ext_waiting"  # values given before there were variables to hold them
ACCUMULATOR = "gradient_accumulator"  # Keras' sums of this rank's gradients, not yet reduced
AVERAGE = "average"  # Keras' averages of weights


@contextlib.contextmanager
def saving_values(optimizer: Any, values: dict[str, Any]) -> Iterator[None]:
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

    def numpy(self) -> np.ndarray:
        """The value."""
        return np.asarray(self._value)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        del copy
        return np.asarray(self._value, dtype)


def in_place(optimizer: Any, variables: list[Any]) -> list[Any]:
    """The optimizer's variables; inside of :func:`saving_values` the values that stand for them."""
    values = optimizer.__dict__.get(IN_PLACE)
    if values is None:
        return variables
    return [Saved(variables[int(number)].path, value) for number, value in values.items()]


def set_weights(optimizer: Any, weights: Sequence[Any], set_all: Callable[[Any], None]) -> None:
    """What :func:`load_variables` does, for Keras' ``set_weights``.

    Raises:
        RuntimeError: as the errors of ``load``. Reading an .h5 file, Keras takes a ValueError for a
            reason to go on without the state, on this rank alone.
    """
    wrapper = optimizer._hvd_ext
    if not optimizer.built:
        optimizer.__dict__[WAITING] = [  # the file is closed soon
            Saved(_name_in_h5(weight), np.array(weight)) for weight in weights]
        return
    if wrapper.plain_count is None or not hasattr(weights, "__len__"):
        set_all(weights)
        return
    store = {str(number): np.array(value) for number, value in enumerate(weights)}
    names = [_name_in_h5(weight) for weight in weights[wrapper.plain_count:]]
    try:
        load_variables(optimizer, store, lambda values: set_all([values[key] for key in store]),
                       Layout.from_names(names) if names and all(names) else None)
    except ValueError as error:
        raise RuntimeError(str(error)) from error


def _name_in_h5(weight: Any) -> str:
    """The last part of the path under which an .h5 file holds a weight; "" where it is not known."""
    name = weight.path if isinstance(weight, Saved) else getattr(weight, "name", None)
    return str(name or "").rpartition("/")[2]


def set_waiting_weights(optimizer: Any) -> None:
    """Set what ``set_weights`` was given before the optimizer was built."""
    weights = optimizer.__dict__.pop(WAITING, None)
    if weights is not None:
        optimizer.set_weights(weights)


def save_variables(optimizer: Any, store: Any, save_all: Callable[[Any], None]) -> None:
    """What Keras asks an optimizer for: its variables, or the values of :func:`saving_values`."""
    values = optimizer.__dict__.get(IN_PLACE)
    if values is None:
        save_all(store)
        layout = layout_of(optimizer) if optimizer.built else Layout()
        if layout.names:
            store[KEY] = np.frombuffer(layout.to_bytes(), np.uint8)
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


def load_variables(optimizer: Any, store: Any, load_all: Callable[[Any], None],
                   saved: Layout | None = None) -> None:
    """Take back what a file holds; state of one rank only on that rank.

    What the extensions here do not know is left out, with a warning; what the file lacks starts anew.

    Args:
        optimizer: distributed.
        store: arrays by number, in the layout of any distributed optimizer, or the plain one's.
        load_all: the wrapped class's own loading, of all variables.
        saved: what follows the plain optimizer's variables, where the store does not say.

    Raises:
        ValueError: the file is another rank's, or holds less than this optimizer needs; nothing is loaded.
    """
    wrapper, variables = optimizer._hvd_ext, list(optimizer.variables)
    numbers, plain = [key for key in list(store.keys()) if key != KEY], wrapper.plain_count
    if plain is None:
        load_all(store)  # Keras says why it loads nothing
        return
    values = [np.asarray(store[str(number)]) for number in range(len(numbers))]
    if len(values) < min(plain, FROM_THE_START + 1):  # saved before it was built
        for variable, value in zip(variables, values, strict=False):
            as_tf(variable).assign(value)
        return
    if len(values) < plain:
        raise ValueError(
            f"the file holds {len(values)} variables of an optimizer, {optimizer.name!r} has {plain}: it is "
            "of another optimizer or model; build the one that was saved")
    here = layout_of(optimizer)
    saved = saved or _layout_in(store, len(values), plain, here)
    check_server(saved, here)
    if saved.server is not None and wrapper.server is not None:
        check_stamp(values[plain + saved.names.index(SERVER_STAMP)], wrapper.collectives)
    own = dict(zip(here.names, variables[plain:], strict=True))
    extended = dict(zip(saved.names, values[plain:], strict=True))
    other_rank = _is_other_rank(wrapper, extended, saved, here)
    taken = _values_to_take(optimizer, own, extended, saved, here, other_rank=other_rank)
    chosen = _plain_values(optimizer, values[:plain], whole=saved.server is None or wrapper.server is None)
    if not wrapper.reset_per_rank_state and wrapper.collectives.rank == 0:
        held = {name: bool(np.any(np.asarray(value, np.float64))) for name, value in
                zip(saved.names, values[plain:], strict=True) if name not in taken}
        if other_rank:  # what has a place here is told below
            held = {name: full and name not in own for name, full in held.items()}
        text = dropped_message(saved, here, held)
        if text:
            warnings.warn(text, stacklevel=2)
    if other_rank and not wrapper.reset_per_rank_state:
        _warn_of_other_rank(wrapper, extended)
    for variable, value in chosen:
        variable.assign(value)
    for name, variable in own.items():
        if name in taken:
            as_tf(variable).assign(taken[name])
        else:
            as_tf(variable).assign(tf.zeros_like(as_tf(variable)))
    if other_rank and wrapper.reducer.staleness:
        optimizer.reset_per_rank_state()  # no gradient waits
    wrapper.stamp_rank()
    wrapper.loaded = ("own" if taken and not other_rank else "new", int(optimizer.iterations))


def _warn_of_other_rank(wrapper: Any, values: dict[str, Any]) -> None:
    """Warn, on one rank, of what begins new because the file, with these values, is another rank's."""
    rank, ranks = (int(number) for number in np.asarray(values[STAMP]))
    here = wrapper.collectives
    labels = {one.part.label for one in wrapper.reducer.declared_state() if one.part.scope != SHARED
              and one.part.label and np.any(np.asarray(values.get(one.name, 0), np.float64))}
    if labels and here.rank == ((rank, ranks) == (0, here.size)):
        warnings.warn(state.dropped_message(sorted(labels), (
            f"this optimizer state was saved by rank {rank} of {ranks} and is loaded by rank {here.rank} of "
            f"{here.size}")) + "; reset_per_rank_state=True silences this", stacklevel=3)


def layout_of(optimizer: Any) -> Layout:
    """What follows the plain optimizer's variables in a distributed one."""
    wrapper = optimizer._hvd_ext
    reducer, server = getattr(wrapper.reducer, "inner", wrapper.reducer), wrapper.server
    method = getattr(reducer, "saved_as", type(reducer).__name__).removesuffix("Reducer")
    return Layout(
        tuple(name_of(one).rpartition("/")[2] for one in list(optimizer.variables)[wrapper.plain_count:]),
        "" if method == "Plain" else method, None if server is None else server.saved_as,
        wrapper.collectives.size)


def _layout_in(store: Any, count: int, plain: int, here: Layout) -> Layout:
    if KEY in list(store.keys()):
        return Layout.from_bytes(np.asarray(store[KEY]).tobytes())
    return here if count == plain + len(here.names) else Layout(("",) * (count - plain))


def _is_other_rank(wrapper: Any, values: dict[str, Any], saved: Layout, here: Layout) -> bool:
    """Whether the state of the extensions here is in the file as another rank keeps it."""
    names = common_names(saved, here)
    if STAMP not in names or len(names) < 2:
        return False
    return [*np.asarray(values[STAMP])] != [wrapper.collectives.rank, wrapper.collectives.size]


def _values_to_take(optimizer: Any, own: dict[str, Any], values: dict[str, Any], saved: Layout, here: Layout,
                    *, other_rank: bool) -> dict[str, Any]:
    """What the extensions here take over of a file, by name.

    Args:
        other_rank: the file is another rank's.

    Raises:
        ValueError: it was made with other settings.
    """
    wrapper = optimizer._hvd_ext
    names = common_names(saved, here)
    if other_rank:
        names = {name for name in names if not is_per_rank(own[name])}
    elif wrapper.reset_per_rank_state:
        reset = {id(one) for one in (*wrapper.reducer.per_rank_state(), wrapper.reducer.stamp)}
        names = {name for name in names if id(as_tf(own[name])) not in reset}
    for name in names:
        if values[name].shape != tuple(own[name].shape):
            raise ValueError(
                f"the file's {name} is of shape {values[name].shape}, that of {optimizer.name!r} of "
                f"{tuple(own[name].shape)}: it was saved with other settings of "
                f"{' and '.join(here.list_extensions())}; give those that it was saved with, or pass "
                "reset_per_rank_state=True to start that state anew")
    return {name: values[name] for name in names}


def _plain_values(optimizer: Any, values: Sequence[Any], *, whole: bool) -> list[tuple[tf.Variable, Any]]:
    """Which values this rank's part of the plain optimizer takes.

    Args:
        values: by number; ``whole`` says whether each is complete, or as this rank holds it.

    Raises:
        ValueError: a shape is another.
    """
    wrapper, chosen = optimizer._hvd_ext, []
    for number, variable in enumerate(plain_variables(optimizer)):
        reference, kind = wrapper.references.get(id(as_tf(variable)), (None, ""))
        saved, here = np.asarray(values[number]), as_tf(variable)
        if saved.dtype.kind == "V":  # bfloat16 from NumPy's files
            saved = saved.view(here.dtype.as_numpy_dtype)
        shared = wrapper.server is None or reference is None or kind == ACCUMULATOR or not whole
        piece = None if shared or kind == BESIDE else wrapper.server.stand_ins.shard_of(reference)
        expected = whole_shape(optimizer, variable) if whole else tuple(here.shape)
        if saved.shape != expected:
            raise ValueError(f"the file's state {number} is of shape {saved.shape}, that of "
                             f"{name_of(variable)} of {expected}: it is of another model or optimizer, or of "
                             "another server=; hvd.save_model writes one file for every server=")
        if shared or wrapper.server.owns_variable(reference):
            chosen.append((here, saved if piece is None else
                           saved.reshape(-1)[piece.start : piece.stop].reshape(here.shape)))
    return chosen


def load_plain(optimizer: Any, store: Any) -> None:
    """A state without extensions: this rank takes what it owns, the extensions start anew."""
    for variable, value in _plain_values(optimizer, [store[str(number)] for number in range(len(store))],
                                         whole=True):
        variable.assign(value)
    for variable in list(optimizer.variables)[optimizer._hvd_ext.plain_count:]:
        as_tf(variable).assign(tf.zeros_like(as_tf(variable)))
    optimizer._hvd_ext.stamp_rank()


def check_stamp(saved: Any, collectives: Collectives) -> None:
    """Refuse a server's part that was saved by another rank, or on another number of ranks.

    Args:
        saved: the (rank, ranks) that the file holds.

    Raises:
        ValueError: the state is another rank's.
    """
    rank, ranks = (int(number) for number in np.asarray(saved))
    if (rank, ranks) == (collectives.rank, collectives.size):
        return
    raise ValueError(
        f"the optimizer's state in the file is that of rank {rank} of {ranks}, this is rank "
        f"{collectives.rank} of {collectives.size}: save and load one file per rank, or save one for all "
        "with hvd.save_model")

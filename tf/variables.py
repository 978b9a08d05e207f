"""Keras variables and tf.Variables side by side: one view of both, names, state, broadcasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import horovod.tensorflow as horovod
import keras
import tensorflow as tf

from hvd_ext.tensorflow.collectives import NARROW, Collectives

PER_RANK = "_hvd_ext_per_rank"


def as_tf(variable: Any) -> tf.Variable:
    """The ``tf.Variable`` behind a Keras variable; anything else as it is."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def name_of(variable: Any) -> str:
    """A readable name: the path of a Keras variable, the name of a ``tf.Variable``."""
    return str(getattr(variable, "path", None) or variable.name.split(":")[0])


def mark_per_rank(variable: Any) -> Any:
    """Say that a variable holds this rank's own state, so that no broadcast overwrites it."""
    setattr(as_tf(variable), PER_RANK, True)
    return variable


def is_per_rank(variable: Any) -> bool:
    """Whether :func:`mark_per_rank` was called on it."""
    return getattr(as_tf(variable), PER_RANK, False) is True


def make_state(optimizer: Any, shape: Sequence[int], dtype: Any, name: str,
               per_rank: bool) -> tf.Variable:
    """A variable of zeros that the optimizer's checkpoints hold."""
    variable = optimizer.add_variable(shape=tuple(shape), name=name,
                                      dtype=tf.as_dtype(dtype).name)
    return as_tf(mark_per_rank(variable) if per_rank else variable)


def made_apart(make: Callable[[], Any]) -> Any:
    """What ``make()`` returns, variables that are not saved, made outside of the graph being traced.

    A function whose first trace makes variables, also in ``tf.init_scope``, and then fails, is not
    traced again by TensorFlow: it returns None from then on. Another thread traces nothing.
    """
    if not tf.compat.v1.executing_eagerly_outside_functions():  # TensorFlow 1
        with tf.init_scope():
            return make()
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(make).result()


def broadcast_variables(variables: Iterable[Any], root_rank: int,
                        process_set: Any = horovod.global_process_set,
                        inplace: bool = False) -> Any:
    """Copy variables from rank ``root_rank`` to all, as ``horovod.tensorflow.broadcast_variables``.

    Takes Keras 3 variables as well as tf.Variables. State that belongs to one rank (residuals of
    a compression, gradients accumulated so far) is left alone.
    """
    shared = [as_tf(variable) for variable in variables if not is_per_rank(variable)]
    narrow = [variable for variable in shared if variable.dtype.base_dtype in NARROW]
    others = [variable for variable in shared if variable.dtype.base_dtype not in NARROW]
    sent = horovod.broadcast_variables(others, root_rank, process_set=process_set, inplace=inplace) \
        if others else None
    if not narrow:
        return sent
    ranks = process_set.ranks
    collectives = Collectives(process_set, counted=False)
    root = root_rank if ranks is None else list(ranks).index(root_rank)
    assigned = [variable.assign(collectives.broadcast(
        tf.convert_to_tensor(variable), root, f"broadcast_variables/{number}"))
        for number, variable in enumerate(narrow)]
    return None if tf.executing_eagerly() else tf.group(*assigned, *([] if sent is None else [sent]))


class CallableList(list):
    """A list that can be called, as Keras 2's ``variables`` were."""

    def __call__(self) -> CallableList:
        return self

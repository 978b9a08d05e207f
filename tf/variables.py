"""Keras variables and tf.Variables side by side: one view of both, names, state, broadcasts."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import horovod.tensorflow as horovod
import keras
import tensorflow as tf
from horovod.tensorflow.mpi_ops import MPI_LIB

from hvd_ext.consistency.fingerprint import Fingerprint
from hvd_ext.tensorflow.collectives import NARROW, Collectives, in_session_graphs, unique_op_name
from hvd_ext.tensorflow.consistency.handshake import OUTSIDE_GRAPH, compare_settings

PER_RANK = "_hvd_ext_per_rank"
NUMBERS = re.compile(r"_?\d+")  # in names: Keras counts the layers of a kind that a process has made


def as_tf(variable: Any) -> tf.Variable:
    """The ``tf.Variable`` behind a Keras variable; anything else as it is."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def name_of(variable: Any) -> str:
    """A readable name: the path of a Keras variable, the name of a ``tf.Variable``."""
    return str(getattr(variable, "path", None) or variable.name.split(":")[0])


def refuse_complex(variables: Iterable[Any]) -> None:
    """Refuse variables whose gradients Horovod cannot add up.

    Raises:
        ValueError: one is complex; names it.
    """
    for one in variables:
        if as_tf(one).dtype.is_complex:
            raise ValueError(
                f"{name_of(one)} is a {as_tf(one).dtype.name} variable, which cannot be reduced: Horovod "
                "adds up real numbers. Keep its real and imaginary part in two variables, and use "
                "tf.complex(real, imag) in the model; or freeze it")


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


@contextlib.contextmanager
def create_without_lifting() -> Iterator[None]:
    """Variables are made outside of the graph being traced, and TensorFlow does not hear of it.

    Where a first trace makes variables TensorFlow traces the whole function a second time without.
    """
    with contextlib.ExitStack() as scopes:
        scopes.enter_context(tf.init_scope())
        if tf.compat.v1.executing_eagerly_outside_functions():
            scopes.enter_context(tf.variable_creator_scope(
                lambda make, **given: make(**{**given, "experimental_enable_variable_lifting": False})))
        yield


def create_outside_graph(make: Callable[[], Any]) -> Any:
    """What ``make()`` returns, variables that are not saved, made outside of the graph being traced.

    A function whose first trace makes variables, also in ``tf.init_scope``, and then fails, is not
    traced again by TensorFlow: it returns None from then on. Another thread traces nothing.
    """
    if not tf.compat.v1.executing_eagerly_outside_functions():  # TensorFlow 1
        with tf.init_scope():
            return make()
    with ThreadPoolExecutor(1, thread_name_prefix=OUTSIDE_GRAPH) as apart:
        return apart.submit(make).result()


def broadcast_variables(variables: Iterable[Any], root_rank: int,
                        process_set: Any = horovod.global_process_set,
                        inplace: bool = False) -> Any:
    """Copy variables from rank ``root_rank`` to all, as ``horovod.tensorflow.broadcast_variables``.

    Takes Keras 3 variables as well as tf.Variables. State that belongs to one rank (residuals of
    a compression, gradients accumulated so far) is left alone. The order counts, not the names,
    which Keras numbers by how many layers this rank made before.

    Args:
        variables: of Keras or TensorFlow, the same ones on every rank.
        root_rank: the rank whose values all get.
        process_set: the ranks that take part.
        inplace: Horovod's: broadcast without a copy.

    Raises:
        ValueError: outside of a graph, on every rank: the ranks' variables differ in number, shape,
            dtype or order.
    """
    shared = tuple(as_tf(variable) for variable in variables if not is_per_rank(variable))
    if in_session_graphs():
        return tf.group(*_assign_broadcast(shared, root_rank, process_set, inplace))
    if tf.executing_eagerly():
        from hvd_ext.tensorflow.persistence.optimizer_broadcast import begin_alike

        _must_be_alike(shared, Collectives(process_set, counted=False))
        way: Any = functools.partial(_assign_broadcast, inplace=True) if inplace else _assign_all
        begin_alike(shared, root_rank, Collectives(process_set, counted=False),
                    functools.partial(way, shared, root_rank, process_set))
        return None
    _assign_broadcast(shared, root_rank, process_set, inplace)
    return None


def _must_be_alike(variables: Sequence[tf.Variable], collectives: Collectives) -> None:
    # Of a moment only its kind: before it stands the weight's path, which is shorter in a model from a file.
    kinds = (re.split("[/_]", NUMBERS.sub("", variable.name.split(":")[0]))[-1] for variable in variables)
    mine = Fingerprint(tuple(
        f"variable {number}: {kind} {tuple(variable.shape)} {variable.dtype.base_dtype.name}"
        for number, (variable, kind) in enumerate(zip(variables, kinds, strict=True))))
    try:
        compare_settings(collectives, mine, "broadcast the same variables", "Make the same model and "
                         "optimizer on every rank, and build both before their variables are broadcast")
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(str(error)) from None


def _assign_broadcast(variables: Sequence[tf.Variable], root_rank: int, process_set: Any,
                      inplace: bool = False) -> list[Any]:
    collectives = Collectives(process_set, counted=False)
    ranks = process_set.ranks
    root = root_rank if ranks is None else list(ranks).index(root_rank)
    by_device: dict[str, list[tf.Variable]] = {}
    assigned = []
    for number, variable in enumerate(variables):
        if inplace and variable.dtype.base_dtype not in NARROW:
            by_device.setdefault(variable.device, []).append(variable)
        else:
            assigned.append(variable.assign(collectives.broadcast(
                tf.convert_to_tensor(variable), root, f"broadcast_variables.{number}")))
    for number, group in enumerate(by_device.values()):
        assigned.append(MPI_LIB.horovod_broadcast_inplace_resource(  # broadcast_ takes the variables' names
            [variable.handle for variable in group],
            name=unique_op_name(f"broadcast_variables_in_place.{number}"),
            variable_names=[str(place) for place in range(len(group))], root_rank=root_rank,
            process_set_id=process_set.process_set_id))
    return assigned


@tf.function(autograph=False)
def _assign_all(variables: tuple[tf.Variable, ...], root_rank: int, process_set: Any) -> None:
    _assign_broadcast(variables, root_rank, process_set)  # in one graph they travel side by side


class CallableList(list):
    """A list that can be called, as Keras 2's ``variables`` were."""

    def __call__(self) -> CallableList:
        return self

"""Horovod elastic for TensorFlow, with states that carry Keras 3 models and the extensions' state.

A commit brings together what the ranks keep in pieces (moments under ``server=``, MeanSquare), so that any
number of ranks can go on from it: it is a collective then. Before ranks leave or join in good order all
share what each of them keeps alone (residuals). After a change every function that the exchange was traced
into is traced again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf
from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from horovod.tensorflow.elastic import *  # noqa: F403
from horovod.tensorflow.functions import broadcast_object
from horovod.tensorflow.mpi_ops import init, rank, shutdown

from hvd_ext.horovod_api import aliases
from hvd_ext.membership import CommitInfo, MembershipChange
from hvd_ext.tensorflow import keras_hooks
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.persistence.elastic_snapshot import ElasticSnapshot, optimizers_of
from hvd_ext.tensorflow.variables import as_tf, broadcast_variables

__all__ = ["TensorFlowKerasState", "TensorFlowState", "run"]


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``func(state, ...)`` again, from the last commit, when ranks come and go: Horovod's decorator.

    Also of an exchange inside a traced function that failed because a rank has left; any other error of
    TensorFlow's is raised.

    Args:
        func: takes the state first.

    Returns:
        A function that takes the same arguments.
    """
    @functools.wraps(func)
    def training(state: Any, *args: Any, **kwargs: Any) -> Any:
        with _horovods_errors():
            return func(state, *args, **kwargs)

    def reset() -> None:
        shutdown()
        init()

    return run_fn(training, reset)


@contextlib.contextmanager
def _horovods_errors() -> Iterator[None]:
    """TensorFlow's errors of a collective that failed, as Horovod's elastic loop knows them."""
    try:
        yield
    except (tf.errors.UnknownError, tf.errors.AbortedError) as error:
        if "Horovod" in str(error):
            raise HorovodInternalError(str(error)) from error
        raise


class _VariablesState(ObjectState):  # type: ignore[misc]
    """Variables that are committed and restored together, and what optimizers among them need.

    ``commit()``, ``save()``, ``sync()`` and ``check_host_updates()`` are to be called by all ranks
    together; making a state is no collective, as a rank that joins stands alone then.
    """

    def __init__(self, optimizers: Iterable[Any], **kwargs: Any) -> None:
        self._carried = [ElasticSnapshot(optimizer) for optimizer in optimizers]
        self._place: CommitInfo | None = None  # of the last commit
        self._commit = 0
        self._made_on = _commit_info()
        self._saved: list[np.ndarray] = []
        self._keep_values()
        super().__init__(bcast_object=broadcast_object, get_rank=rank, **kwargs)

    def _state_variables(self) -> list[tf.Variable]:
        raise NotImplementedError

    def save(self) -> None:
        """Keep everything in host memory, complete on every rank. A collective."""
        for one in self._carried:
            one.gather_state()
        self._keep_values()
        self._commit += 1
        self._place = replace(_commit_info(), commit=self._commit)
        super().save()

    def restore(self) -> None:
        """Take back the last commit."""
        for variable, value in zip(self._state_variables(), self._saved, strict=True):
            variable.assign(value)
        for one in self._carried:
            one.restore()
        super().restore()

    def sync(self) -> None:
        """Bring all ranks to rank 0's step, whoever has left or joined. A collective.

        Raises:
            ValueError: on every rank, when their variables differ in number, order, shape or dtype.
        """
        with _horovods_errors():
            self._compare_commits()
            super().sync()
            self.save()

    def _compare_commits(self) -> None:
        broadcast_variables(self._state_variables(), root_rank=0)
        reunion = MembershipChange.from_places(Collectives().allgather_object(self._place, "hvd_ext.places"))
        if reunion.first and self._made_on != _commit_info():  # the ranks changed before training began
            for one in self._carried:
                one.rebuild_for_world_size()
        elif reunion.changed and not reunion.first:
            for one in self._carried:
                one.rejoin(reunion)
        self._commit = reunion.commit

    def check_host_updates(self) -> None:
        """Raise ``HostsUpdatedInterrupt`` on all ranks when hosts were added or will be removed."""
        try:
            super().check_host_updates()
        except HostsUpdatedInterrupt:
            for one in self._carried:
                one.average_local_state()
            self.save()
            assert self._place is not None
            self._place = replace(self._place, handed_on=True)
            # Horovod skips sync() where ranks only leave; owners and slices have moved then, too.
            raise HostsUpdatedInterrupt(False) from None

    def _keep_values(self) -> None:
        self._saved = [variable.numpy() for variable in self._state_variables()]
        for one in self._carried:
            one.keep_local()


class TensorFlowKerasState(_VariablesState):
    """A Keras model, its optimizer and further attributes, committed and restored together.

    Args:
        model: a built Keras model.
        optimizer: its optimizer, when the model is not compiled with one.
        backend: ignored; in Horovod's signature for TensorFlow 1.
        kwargs: further attributes to keep, such as ``batch=0, epoch=0``.

    Raises:
        ValueError: the model is not built, or there is no optimizer.
    """

    def __init__(self, model: Any, optimizer: Any = None, backend: Any = None,
                 **kwargs: Any) -> None:
        del backend
        if not model.built:
            raise ValueError(f"the model {model.name!r} must be built first: call it on a batch, "
                             "or model.build(input_shape)")
        self.model = model
        self.optimizer = optimizer or model.optimizer
        if self.optimizer is None:
            raise ValueError("give optimizer=, or compile the model first")
        if not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        inner = keras_hooks.distributed_part(self.optimizer)
        super().__init__([] if inner is None or keras_hooks.wrapper_of(inner) is None else [inner],
                         **kwargs)

    def _state_variables(self) -> list[tf.Variable]:
        return [as_tf(one) for one in [*self.model.variables, *self.optimizer.variables]]


class TensorFlowState(_VariablesState):
    """Variables and further attributes, committed and restored together.

    Of a distributed optimizer some of whose variables are among them, all are carried.

    Args:
        variables: tf.Variables and Keras variables, such as those of models and of their optimizers, which
            must be built.
        session: refused; for TensorFlow 1.
        kwargs: further attributes to keep.

    Raises:
        ValueError: no variables are given.
        NotImplementedError: a session is.
    """

    def __init__(self, variables: Any = None, session: Any = None, **kwargs: Any) -> None:
        if session is not None:
            raise NotImplementedError("session= is TensorFlow 1's: train eagerly or in a tf.function, or "
                                      "use horovod.tensorflow.elastic.TensorFlowState")
        if not variables:
            raise ValueError("give variables=: those of the model and of its optimizer, once both are built")
        self.variables = list(variables)
        given = [as_tf(one) for one in self.variables]
        optimizers = optimizers_of(given)
        known = {id(one) for one in given}
        self._all = given + [as_tf(one) for optimizer in optimizers for one in optimizer.variables
                             if id(as_tf(one)) not in known]
        super().__init__(optimizers, **kwargs)

    def _state_variables(self) -> list[tf.Variable]:
        return self._all


def _commit_info() -> CommitInfo:
    collectives = Collectives()
    return CommitInfo(collectives.rank, collectives.size)


__getattr__ = aliases.module_getattr(__name__, "horovod.tensorflow.elastic")

"""Lets :mod:`hvd_ext.watchdog.watchdog` see what a graph waits for, where no Python runs."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.config import is_op_determinism_enabled

from hvd_ext.tensorflow.variables import create_outside_graph
from hvd_ext.watchdog.watchdog import WATCH, PendingWait

HOME = os.path.join(os.path.dirname(tf.__file__), "")


class GraphWaitProbe:
    """Two times, set when this rank has done its part of an exchange and when its answer has come.

    A graph that fails in between never sets the second. It has no caller any more, and nobody waits.

    Args:
        what: the exchange, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._begun: tf.Variable | None = None
        self._ended: tf.Variable | None = None
        self._failed = 0.0  # when an exchange began whose graph has failed
        self._offset = time.monotonic() - time.time()  # graphs only know the time of day

    def create_variables(self) -> None:
        """Make the two variables, before a graph is traced if that can be."""
        if self._begun is not None or not tf.compat.v1.executing_eagerly_outside_functions():
            return  # TensorFlow 1, whose variables somebody would have to initialise
        self._begun, self._ended = (create_outside_graph(_time_variable) for _ in range(2))
        ours = weakref.ref(self)
        WATCH.add_probe(lambda: None if ours() is None else ours().current_wait())

    def start_wait(self, ready: Sequence[Any]) -> list[tf.Operation]:
        """In a graph being traced: from when ``ready`` is there, this rank waits; for ``end``."""
        self.create_variables()
        return [] if self._begun is None else [_assign_after(self._begun, _collect_tensors(ready))]

    def end_wait(self, begun: list[tf.Operation], results: Sequence[Any]) -> None:
        """In a graph being traced: once ``results`` are there it does not."""
        if self._ended is not None:
            _assign_after(self._ended,
                          [*begun, *_collect_tensors(results)])  # else the second may be set before the first

    def reset_waits(self) -> None:
        """Outside of any graph: what was waited for has failed."""
        if self._ended is not None:
            self._ended.assign(_time_of_day())

    def current_wait(self) -> PendingWait | None:
        """What the graph waits for now, if anything."""
        assert self._begun is not None
        assert self._ended is not None
        ended, begun = float(self._ended), float(self._begun)
        if ended > 0:
            WATCH.mark_step_done()
        if begun <= ended or begun == self._failed:
            return None
        if not _in_tensorflow():
            self._failed = begun
            return None
        return PendingWait(self._what, begun + self._offset)


def shutdown() -> None:
    """Shut Horovod down; waits for a shutdown after a time limit, if one is in progress."""
    WATCH.await_abort()
    horovod.shutdown()


def _in_tensorflow() -> bool:
    """Whether a thread of Python's may be waiting for a graph."""
    if not tf.config.experimental.get_synchronous_execution():
        return True
    return any(frame.f_code.co_filename.startswith(HOME) for thread, frame in sys._current_frames().items()
               if thread != threading.get_ident())


def _collect_tensors(given: Sequence[Any]) -> list[Any]:
    return [part for one in given if one is not None
            for part in ((one.values,) if isinstance(one, tf.IndexedSlices) else (one,))]


def _assign_after(variable: tf.Variable, after: Sequence[Any]) -> tf.Operation:
    with tf.control_dependencies(after), tf.device("cpu"):
        return variable.assign(_time_of_day(), read_value=False)


def _time_of_day() -> tf.Tensor:
    """The time of day. TensorFlow's own operation is an error under ``enable_op_determinism()``."""
    if not is_op_determinism_enabled():
        return tf.timestamp()
    return tf.ensure_shape(tf.numpy_function(lambda: np.float64(time.time()), [], tf.float64), ())


def _time_variable() -> tf.Variable:
    with tf.device("cpu"):
        return tf.Variable(0.0, dtype=tf.float64, trainable=False)

"""Lets :mod:`hvd_ext.watch` see what a graph waits for, where no Python runs."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvd_ext.tensorflow.variables import made_apart
from hvd_ext.watch import WATCH, Wait


class Waiting:
    """Two times, set when this rank has done its part of an exchange and when its answer has come.

    Args:
        what: the exchange, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._begun: tf.Variable | None = None
        self._ended: tf.Variable | None = None
        self._offset = time.monotonic() - time.time()  # graphs only know the time of day

    def build(self) -> None:
        """Make the two variables, before a graph is traced if that can be."""
        if self._begun is not None or not tf.compat.v1.executing_eagerly_outside_functions():
            return  # TensorFlow 1, whose variables somebody would have to initialise
        self._begun, self._ended = (made_apart(_time) for _ in range(2))
        ours = weakref.ref(self)
        WATCH.add_source(lambda: None if ours() is None else ours().look())

    def begin(self, ready: Sequence[Any]) -> None:
        """In a graph being traced: from when ``ready`` is there, this rank waits."""
        self.build()
        if self._begun is not None:
            self._mark(self._begun, ready)

    def end(self, results: Sequence[Any]) -> None:
        """In a graph being traced: once ``results`` are there it does not."""
        if self._ended is not None:
            self._mark(self._ended, results)

    def forget(self) -> None:
        """Outside of any graph: what was waited for has failed."""
        if self._ended is not None:
            self._ended.assign(tf.timestamp())

    def _mark(self, variable: tf.Variable, after: Sequence[Any]) -> None:
        tensors = [part for one in after if one is not None
                   for part in ((one.values,) if isinstance(one, tf.IndexedSlices) else (one,))]
        with tf.control_dependencies(tensors), tf.device("cpu"):
            variable.assign(tf.timestamp())

    def look(self) -> Wait | None:
        """What the graph waits for now, if anything."""
        assert self._begun is not None
        assert self._ended is not None
        ended, begun = float(self._ended), float(self._begun)
        if ended > 0:
            WATCH.step_over()
        return Wait(self._what, begun + self._offset) if begun > ended else None


def _time() -> tf.Variable:
    with tf.device("cpu"):
        return tf.Variable(0.0, dtype=tf.float64, trainable=False)

"""Curvature that a tape's gradient has taken is pending until an update uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from hvd_ext.tensorflow.seng.layer_curvature import LayerCurvature
from hvd_ext.tensorflow.seng.shared_functions import SharedFunctions, outside_trace, read_handle, write_handle


class PendingCurvature:
    """The curvature from before the last refresh, as long as it may have to come back.

    Args:
        systems: of all layers.
        traces: theirs.
    """

    def __init__(self, systems: Sequence[LayerCurvature], traces: SharedFunctions) -> None:
        self._traces = traces
        self._of_before = SharedFunctions()
        self._variables = [variable for one in systems for variable in one.curvature_variables]
        self._before = [tf.Variable(tf.zeros([0] * one.shape.rank, one.dtype), trainable=False,
                                    shape=[None] * one.shape.rank) for one in self._variables]
        self._held = tf.Variable(False, trainable=False)
        self._of_before.pack_handles(self._before)

    def keep_before(self) -> None:
        """Before a refresh: keep what is there."""
        self._each(lambda now, before, one: write_handle(before, read_handle(now, one.dtype)))
        self._held.assign(True)

    def take_back(self) -> None:
        """Bring back what was there before the last refresh, if no update has used the new curvature."""
        self._if_held(lambda now, before, one: write_handle(now, read_handle(before, one.dtype)))

    def commit(self) -> None:
        """An update has used it: free what was kept."""
        def free(now: tf.Tensor, before: tf.Tensor, one: tf.Variable) -> None:
            if one.shape.rank:
                empty = read_handle(before, one.dtype, [None] * one.shape.rank)
                write_handle(before, empty[(slice(0, 0),) * one.shape.rank])

        self._if_held(free)

    def forget_before(self) -> None:
        """Forget what was kept, outside of any graph."""
        self._held.assign(False)

    def _if_held(self, change: Callable[[tf.Tensor, tf.Tensor, tf.Variable], None]) -> None:
        def run() -> tf.Tensor:
            self._each(change)
            self._held.assign(False)
            return tf.constant(True)

        outside_trace(lambda: tf.cond(self._held.read_value(), run, lambda: tf.constant(False)))

    def _each(self, change: Callable[[tf.Tensor, tf.Tensor, tf.Variable], None]) -> None:
        """``change`` each variable: its handle, that of the value from before, the variable."""
        with self._traces.unpacked_handles(), self._of_before.unpacked_handles():
            for one, before in zip(self._variables, self._before, strict=True):
                change(self._traces.variable_handle(one), self._of_before.variable_handle(before), one)

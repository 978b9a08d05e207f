"""``BroadcastGlobalVariablesHook`` for ``tf.compat.v1.train.MonitoredTrainingSession``.

Horovod has it only where TensorFlow offers ``tf.train.SessionRunHook`` or estimators, as it no longer does.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hvd_ext.tensorflow.collectives import in_session_graphs
from hvd_ext.tensorflow.variables import broadcast_variables


class BroadcastGlobalVariablesHook(tf.compat.v1.train.SessionRunHook):
    """Copies all global variables from one rank to the others when the session begins.

    Args:
        root_rank: the rank whose values count.
        device: where the broadcasts run.
    """

    def __init__(self, root_rank: int, device: str = "") -> None:
        self.root_rank = root_rank
        self.device = device
        self.bcast_op: Any = None

    def begin(self) -> None:
        """Add the broadcasts to the graph.

        Raises:
            RuntimeError: TensorFlow executes eagerly.
        """
        if not in_session_graphs():
            raise RuntimeError(
                "hvd.BroadcastGlobalVariablesHook is for graphs of TensorFlow 1; without "
                "tf.compat.v1.disable_eager_execution() call hvd.broadcast_variables(variables, "
                "root_rank=0), or pass hvd.callbacks.BroadcastGlobalVariablesCallback(0) to fit")
        if self.bcast_op is None or self.bcast_op.graph is not tf.compat.v1.get_default_graph():
            with tf.device(self.device):
                self.bcast_op = broadcast_variables(tf.compat.v1.global_variables(), self.root_rank)

    def after_create_session(self, session: Any, coord: Any) -> None:
        """Run them."""
        del coord
        session.run(self.bcast_op)

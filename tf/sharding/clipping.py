"""Clipping by the norm of all gradients, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from hvd_ext.tensorflow.reducers.sharded import ShardedReducer


def clip_by_global_norm(gradients: Sequence[Any], variables: Sequence[Any], max_norm: float,
                        reducer: ShardedReducer) -> list[Any]:
    """What Keras' ``global_clipnorm`` does, where a rank has the reduced gradients of what it owns only.

    The ranks exchange a number for each variable, so that all add up the same ones in the same order.
    """
    present = [index for index, gradient in enumerate(gradients) if gradient is not None]
    given = [gradients[index] for index in present]
    wide = tf.float64 if any(one.dtype == tf.float64 for one in given) else tf.float32
    owned = reducer.owned_gradients(given, [variables[index] for index in present])
    # Read, not constant: TensorFlow runs a collective of constants while it prepares the graph.
    zero = tf.cast(reducer.server.zero.read()[0], wide)
    squares = tf.stack([zero if one is None else tf.reduce_sum(tf.square(tf.cast(one, wide)))
                        for one in owned])
    everyone = reducer.collectives.if_distributed(
        lambda: reducer.collectives.allreduce(squares, f"{reducer.prefix}/clip", op=horovod.Sum,
                                              kind="agreement"), lambda: squares)
    norm = tf.sqrt(tf.reduce_sum(everyone))
    scale = max_norm * tf.minimum(1.0 / norm, 1.0 / max_norm) + (norm - norm)  # NaN where it is not finite
    result = list(gradients)
    for index in present:
        dense = tf.convert_to_tensor(gradients[index])  # as Keras leaves it
        result[index] = dense * tf.cast(scale, dense.dtype)
    return result

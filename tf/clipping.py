"""Clipping by the norm of all gradients, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from hvd_ext.tensorflow.reducers.base import Reducer, times


def clip_by_global_norm(gradients: Sequence[Any], variables: Sequence[Any], max_norm: float,
                        reducer: Reducer) -> list[Any]:
    """What Keras' ``global_clipnorm`` does, where a rank has the reduced gradients of what it owns only.

    The ranks exchange a number for each variable, so that all add up the same ones in the same order, as
    Keras does on the whole gradients.
    """
    present = [index for index, gradient in enumerate(gradients) if gradient is not None]
    given = [gradients[index] for index in present]
    wide = tf.float64 if any(one.dtype == tf.float64 for one in given) else tf.float32
    squares = [tf.reduce_sum(tf.square(tf.cast(tf.convert_to_tensor(one), wide))) for one in given]
    owned = reducer.owned(given, [variables[index] for index in present])
    mine = tf.stack([square if own else tf.zeros_like(square)
                     for own, square in zip(owned, squares, strict=True)])
    everyone = reducer.collectives.if_many(
        lambda: reducer.collectives.allreduce(mine, f"{reducer.prefix}/clip", op=horovod.Sum,
                                              kind="agreement"),
        lambda: tf.stack(squares))
    norm = tf.sqrt(tf.reduce_sum(everyone))
    scale = max_norm * tf.minimum(1.0 / norm, 1.0 / max_norm) + (norm - norm)  # NaN where it is not finite
    result = list(gradients)
    for index in present:
        result[index] = times(gradients[index], scale)
    return result

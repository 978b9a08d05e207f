"""What SENG sends between refreshes: the ranks' ``U_i b_i``, small ones together in one message."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from hvd_ext.tensorflow.seng.blocks import Run
from hvd_ext.tensorflow.seng.state import LayerState

ALONE = 1 << 18  # numbers from which on a message is worth no copy


def mean_over_ranks(wanted: Sequence[tuple[LayerState, Sequence[tf.Tensor]]],
                    run: Run) -> list[tf.Tensor]:
    """The mean of the ranks' contributions to ``U b`` (SENG eq. 26, 28) for layers' gradients.

    Returns:
        Flat tensors, one a block of each layer, in order.
    """
    messages: list[tf.Tensor] = []
    names: list[str] = []
    small: dict[tf.DType, list[int]] = {}
    for state, gradients in wanted:
        for block, message in zip(state.blocks, state.message(gradients, run), strict=True):
            if block.largest(run) < ALONE:
                small.setdefault(message.dtype, []).append(len(messages))
            messages.append(message)
            names.append(f"{run.prefix}.uc/{state.layer.key}")

    def communicate() -> list[tf.Tensor]:
        means = list(messages)
        together = {k for group in small.values() for k in group}
        for k, message in enumerate(messages):
            if k not in together:
                means[k] = run.collectives.allreduce(message, names[k])
        for group in small.values():
            sent = tf.concat([messages[k] for k in group], axis=0)
            mean = run.collectives.allreduce(sent, f"{run.prefix}.uc")
            sizes = tf.stack([tf.size(messages[k]) for k in group])
            for k, part in zip(group, tf.split(mean, sizes, num=len(group)), strict=True):
                means[k] = tf.ensure_shape(part, messages[k].shape)
        return means

    return list(run.collectives.if_many(communicate, lambda: list(messages)))

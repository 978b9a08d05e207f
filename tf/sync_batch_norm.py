"""Batch normalization over the batches of all ranks."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as horovod
import keras
import tensorflow as tf

from hvd_ext.horovod_api import aliases
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.gradient_registry import release_with_graph
from hvd_ext.tensorflow.joining_layers import JOINING, note_joining
from hvd_ext.tensorflow.keras_hooks import refuse_xla, require_tensorflow_backend
from hvd_ext.tensorflow.uneven_data import batch_weight

NAME = "sync_batch_norm"  # Keras' own names are counted per process: ranks may differ in them


@keras.saving.register_keras_serializable(package="hvd_ext")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """``keras.layers.BatchNormalization`` with the moments of the joined batch of all ranks.

    The ranks' batches may differ in size, also be empty; a mask counts as in Keras. Each forward
    pass in training gathers 2 C + 1 numbers a rank (C channels), each backward pass sums M times
    as many. Outputs, gradients and moving statistics are those of one process with all rows; in a loop
    over ``hvd.uneven_inputs`` without those of a rank that has run out of batches.

    Args:
        fused: must be False, as in Horovod.
        process_set: the ranks whose batches are joined. It is not saved with the model.
        kwargs: those of ``keras.layers.BatchNormalization``.

    Raises:
        ValueError: ``fused`` is not False.
    """

    def __init__(self, fused: bool | None = False, *, process_set: Any = None, **kwargs: Any) -> None:
        require_tensorflow_backend("hvd.SyncBatchNormalization")
        if fused in (True, None):
            raise ValueError(f"fused must be False, got {fused!r}: the fused kernel cannot be given the "
                             "moments of other ranks; leave it out")
        super().__init__(**kwargs)
        self.supports_jit = False  # XLA has no kernels for Horovod's collectives
        self.process_set = horovod.global_process_set if process_set is None else process_set
        JOINING.add(self)

    def _moments(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
        """Mean and variance, (C,) each, over the rows of all ranks."""
        collectives = Collectives(self.process_set, counted=False)
        if not self.process_set.included() or collectives.size == 1:
            return super()._moments(inputs, mask)
        refuse_xla("hvd.SyncBatchNormalization")
        note_joining(self)
        weight = tf.cast(tf.reshape(batch_weight().read(), ()), inputs.dtype)
        channels = tf.shape(inputs)[self.axis]
        if mask is None:
            rows = tf.cast(tf.size(inputs) // tf.maximum(channels, 1), inputs.dtype)
            own = inputs
        else:
            shown = tf.broadcast_to(tf.expand_dims(tf.cast(mask, tf.bool), -1), tf.shape(inputs))
            rows = tf.reduce_sum(tf.cast(mask, inputs.dtype))
            own = tf.where(shown, inputs, tf.zeros_like(inputs))
        mean = tf.reduce_sum(own, self._reduction_axes, keepdims=True) / tf.maximum(rows, 1)
        away = inputs - mean if mask is None else tf.where(shown, inputs - mean, tf.zeros_like(inputs))
        squares = tf.reduce_sum(tf.square(away), self._reduction_axes)
        row = tf.concat([rows[None], tf.reshape(mean, [-1]), squares], axis=0)
        row = tf.where(weight > 0, row, tf.zeros_like(row))
        width = inputs.shape[self.axis]
        counts, means, squares = tf.split(
            release_with_graph(gather_rows(collectives, row, weight)), [1, width, width], axis=1)
        # Chan et al. 1979, eq. 2.1: exact where E[x^2] - E[x]^2 would cancel.
        total = tf.maximum(tf.reduce_sum(counts), 1)
        mean = tf.reduce_sum(counts * means, axis=0) / total
        variance = tf.reduce_sum(squares + counts * tf.square(means - mean), axis=0) / total
        return mean, variance


def gather_rows(collectives: Collectives, row: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """Every rank's ``row``, (n,), one below the other, (M, n); differentiable on all ranks.

    ``weight``, 0-D, is what this rank's loss, and then its gradients, are multiplied with. As its rows enter
    the losses of all ranks, each of these comes back by its own weight, divided by this rank's.
    """
    ranks, rank = collectives.size, collectives.rank

    @tf.custom_gradient
    def gather(row: tf.Tensor) -> tuple[tf.Tensor, Any]:
        def backward(upstream: tf.Tensor) -> tf.Tensor:
            counts = weight > 0
            mine = tf.where(counts, upstream * weight, tf.zeros_like(upstream))
            total = collectives.allreduce(mine, f"{NAME}/backward", op=horovod.Sum)
            return tf.where(counts, total[rank] / weight, tf.zeros_like(row))

        return collectives.allgather(row[None], NAME, rows=ranks), backward

    return gather(row)


def convert_sync_batchnorm(model: keras.Model, *, process_set: Any = None) -> keras.Model:
    """Copy a model, with every BatchNormalization layer as a SyncBatchNormalization.

    Weights, moving statistics, names and ``trainable`` are those of ``model``, which is left as it
    is. The copy is not compiled.

    Args:
        model: a functional or ``Sequential`` model; models inside of it are converted too.
        process_set: the ranks whose batches are joined.

    Raises:
        TypeError: ``model`` is no Keras model.
        ValueError: a model that Keras cannot copy layer by layer, or a BatchNormalization inside
            of another layer or of a class of its own.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {model!r}")
    way = "build it with hvd.SyncBatchNormalization in place of keras.layers.BatchNormalization"
    if not isinstance(model, keras.Sequential) and not hasattr(model, "operations"):
        raise ValueError(f"{type(model).__name__} is not a functional or Sequential model, so that its "
                         f"layers cannot be exchanged: {way}")

    def convert(layer: Any) -> Any:
        config = layer.get_config()
        if type(layer) is not keras.layers.BatchNormalization:
            return type(layer).from_config(config)
        made = SyncBatchNormalization.from_config({**config, "synchronized": False})
        made.process_set = horovod.global_process_set if process_set is None else process_set
        return made

    copy = keras.models.clone_model(model, clone_function=convert, recursive=True)
    left = [layer.name for layer in copy._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization)
            and not isinstance(layer, SyncBatchNormalization)]
    if left:
        raise ValueError(f"{', '.join(left)}: inside of another layer, or of a class of its own, which "
                         f"this function does not look into; {way}")
    if model.built:
        copy.set_weights(model.get_weights())
    return copy


__getattr__ = aliases.module_getattr(__name__, "horovod.tensorflow.sync_batch_norm")

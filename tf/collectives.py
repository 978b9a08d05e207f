"""The one place where the TensorFlow front end calls Horovod's collectives.

Every collective has a name of its own that ignores TensorFlow's name scopes: the same name on
every rank, also when one of them traced its function again for a batch of another size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf
from horovod.tensorflow.mpi_ops import process_set_included_op

NARROW = (tf.bfloat16,)  # Horovod's TensorFlow operations do not know it; it travels as float32


class Collectives:
    """Named collectives over one process set, in eager mode and inside ``tf.function``."""

    def __init__(self, process_set: Any = None, *, device_dense: str = "",
                 device_sparse: str = "") -> None:
        self.process_set = horovod.global_process_set if process_set is None else process_set
        self.device_dense = device_dense
        self.device_sparse = device_sparse

    @property
    def size(self) -> int:
        """M, the number of ranks."""
        return int(self.process_set.size())

    @property
    def rank(self) -> int:
        """This rank's number within the process set."""
        return int(self.process_set.rank())

    @property
    def elastic(self) -> bool:
        """Whether the number of ranks may change while a traced function lives."""
        return bool(int(os.environ.get("HOROVOD_ELASTIC", "0")))

    def if_many(self, communicate: Callable[[], Any], alone: Callable[[], Any]) -> Any:
        """``communicate()`` where this rank has others to talk to, ``alone()`` where it has none."""
        if not self.elastic:
            many = self.process_set.included() and self.size > 1
            return communicate() if many else alone()
        with tf.device("cpu"):
            number = self.process_set.process_set_id
            many = tf.logical_and(tf.equal(process_set_included_op(number), 1),
                                  tf.greater(horovod.size_op(number), 1))
        return tf.cond(many, communicate, alone)

    def size_op(self, dtype: tf.DType) -> Any:
        """M as a number of ``dtype``, read when the function runs if it may change."""
        if self.elastic:
            return tf.cast(horovod.size_op(process_set_id=self.process_set.process_set_id), dtype)
        return tf.cast(self.size, dtype)

    def allreduce(self, tensor: tf.Tensor, name: str, *, op: Any = horovod.Average,
                  compression: Any = horovod.Compression.none, **scale: float) -> tf.Tensor:
        """Reduce ``tensor`` over the ranks."""
        if tensor.dtype in NARROW:
            wide = self.allreduce(tf.cast(tensor, tf.float32), name, op=op,
                                  compression=compression, **scale)
            return tf.cast(wide, tensor.dtype)
        return horovod.allreduce(
            tensor, op=op, name=unique(name), compression=compression,
            device_dense=self.device_dense, process_set=self.process_set,
            ignore_name_scope=True, **scale,
        )

    def grouped_allreduce(self, tensors: list[tf.Tensor], name: str, *, op: Any = horovod.Average,
                          compression: Any = horovod.Compression.none,
                          **scale: float) -> list[tf.Tensor]:
        """Reduce several tensors as one group."""
        return list(horovod.grouped_allreduce(
            tensors, op=op, name=unique(name), compression=compression,
            device_dense=self.device_dense, process_set=self.process_set,
            ignore_name_scope=True, **scale,
        ))

    def allreduce_slices(self, slices: tf.IndexedSlices, name: str, *,
                         op: Any = horovod.Average) -> tf.IndexedSlices:
        """Gather the rows of all ranks; their sum (or mean) is the reduced gradient."""
        with tf.device(self.device_sparse):
            values = self.allgather(slices.values, name + "/values")
            indices = self.allgather(slices.indices, name + "/indices")
            if op == horovod.Average:
                values = values / self.size_op(values.dtype)
        return tf.IndexedSlices(values, indices, dense_shape=slices.dense_shape)

    def allgather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Concatenate the ranks' tensors along their first axis, whose length may differ by rank."""
        return horovod.allgather(tensor, name=unique(name), process_set=self.process_set,
                                 ignore_name_scope=True)

    def alltoall(self, tensor: tf.Tensor, splits: Any, name: str) -> tf.Tensor:
        """Send ``splits[s]`` rows to rank s; the result is what all sent here, by rank."""
        received, _ = horovod.alltoall(tensor, splits=tf.constant(splits, tf.int32),
                                       name=unique(name), process_set=self.process_set,
                                       ignore_name_scope=True)
        return received

    def broadcast(self, tensor: tf.Tensor, root: int, name: str) -> tf.Tensor:
        """The tensor of member ``root`` of the process set."""
        ranks = self.process_set.ranks
        root = root if ranks is None else list(ranks)[root]
        return horovod.broadcast(tensor, root, name=unique(name), process_set=self.process_set,
                                 ignore_name_scope=True)

    def all_true(self, flag: tf.Tensor, name: str) -> tf.Tensor:
        """Whether ``flag`` holds on every rank: a decision that all ranks take alike."""
        return self.if_many(
            lambda: tf.equal(self.allreduce(tf.cast(flag, tf.int32), name, op=horovod.Min), 1),
            lambda: tf.cast(flag, tf.bool),
        )

    def allgather_object(self, thing: Any, name: str) -> list[Any]:
        """Every rank's picklable ``thing``, by rank. For errors and checks, not for data."""
        if self.size == 1:
            return [thing]
        return list(horovod.allgather_object(thing, name=name, process_set=self.process_set))


def unique(name: str) -> str:
    """``name`` as Horovod takes it, made unique within the graph that is being traced.

    Two collectives under way at once must not have one name. Outside a graph each is waited for.
    Horovod takes what follows the last "/" when it ignores name scopes, so there is none.
    """
    name = "".join(letter if letter.isalnum() or letter in "_-" else "." for letter in name)
    if tf.executing_eagerly():
        return name
    graph = tf.compat.v1.get_default_graph()
    while getattr(graph, "outer_graph", None) is not None and graph.outer_graph.building_function:
        graph = graph.outer_graph
    names = getattr(graph, "_hvd_ext_names", None)
    if names is None:
        names = graph._hvd_ext_names = {}
    count = names[name] = names.get(name, 0) + 1
    return name if count == 1 else f"{name}_{count - 1}"

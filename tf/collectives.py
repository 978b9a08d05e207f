"""The one place where the TensorFlow front end calls Horovod's collectives and counts their bytes.

Every collective has a name of its own that ignores TensorFlow's name scopes: the same name on
every rank, also when one of them traced its function again for a batch of another size.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf
from horovod.tensorflow.mpi_ops import process_set_included_op

from hvd_ext.consistency.scopes import outside_of_set
from hvd_ext.reducers.traffic import allreduce_bytes, by_kind
from hvd_ext.tensorflow.byte_counts import NullByteCounter, StepByteCounter, count_bytes, outermost_graph

# Horovod's TensorFlow operations do not know it: it is reduced as float32 and moved as int16.
NARROW = (tf.bfloat16,)


class Collectives:
    """Named collectives over one process set, in eager mode and inside ``tf.function``.

    ``kind`` says what the bytes are ("gradients", "values", "weights", ...); ``traffic`` has those
    of the last step, from the sizes of the messages themselves. For a collective whose bytes depend
    on the library's algorithm (allreduce, broadcast) the bandwidth-optimal ring is counted:
    ``2 (M-1)/M`` and ``1`` times the tensor. Under Horovod elastic, where M may change while a
    traced function lives, nothing is counted.
    """

    def __init__(self, process_set: Any = None, *, device_dense: str = "",
                 device_sparse: str = "", counted: bool = True) -> None:
        self.process_set = horovod.global_process_set if process_set is None else process_set
        self.device_dense = device_dense
        self.device_sparse = device_sparse
        self.traffic = StepByteCounter() if counted and not in_session_graphs() else NullByteCounter()
        self.kind = "gradients"

    def counted_as(self, kind: str) -> Collectives:
        """The same ranks and traffic; what does not say its kind is of ``kind``."""
        other = copy.copy(self)
        other.kind = kind
        return other

    @property
    def is_member(self) -> bool:
        """Whether this rank is a member of the process set; one that is not is alone."""
        return self.process_set is horovod.global_process_set or self.process_set.included() is not False

    @property
    def size(self) -> int:
        """M, the number of ranks."""
        return int(self.process_set.size()) if self.is_member else 1

    @property
    def rank(self) -> int:
        """This rank's number within the process set."""
        return int(self.process_set.rank()) if self.is_member else 0

    def refuse_outside(self, what: str) -> None:
        """Refuse a rank that is no member, and would write over what the members write.

        Raises:
            ValueError: this is one.
        """
        if not self.is_member:
            raise ValueError(outside_of_set(what, horovod.rank(), self.process_set.ranks))

    @property
    def is_elastic(self) -> bool:
        """Whether the number of ranks may change while a traced function lives."""
        return bool(int(os.environ.get("HOROVOD_ELASTIC", "0")))

    def if_distributed(self, communicate: Callable[[], Any], alone: Callable[[], Any]) -> Any:
        """``communicate()`` where this rank has others to talk to, ``alone()`` where it has none."""
        if not self.is_elastic:
            many = self.process_set.included() and self.size > 1
            return communicate() if many else alone()
        with tf.device("cpu"):
            number = self.process_set.process_set_id
            many = tf.logical_and(tf.equal(process_set_included_op(number), 1),
                                  tf.greater(horovod.size_op(number), 1))
        return tf.cond(many, communicate, alone)

    def size_op(self, dtype: tf.DType) -> Any:
        """M as a number of ``dtype``, read when the function runs if it may change."""
        if self.is_elastic:
            return tf.cast(horovod.size_op(process_set_id=self.process_set.process_set_id), dtype)
        return tf.cast(self.size, dtype)

    def _count_message(self, kind: str | Mapping[str, int] | None, sent: Any, received: Any) -> None:
        """Count a message; one that holds several kinds says how many bytes are of each."""
        if self.is_elastic:
            return
        kind = self.kind if kind is None else kind
        out, back = by_kind(kind, sent), by_kind(kind, received)
        for part in out:
            self.traffic.count_message(part, out[part], back[part])

    def allreduce(self, tensor: tf.Tensor, name: str, *, op: Any = horovod.Average,
                  compression: Any = horovod.Compression.none,
                  kind: str | None = None, **scale: float) -> tf.Tensor:
        """Reduce ``tensor`` over the ranks."""
        if tensor.dtype in NARROW:
            wide = self.allreduce(tf.cast(tensor, tf.float32), name, op=op,
                                  compression=compression, kind=kind, **scale)
            return tf.cast(wide, tensor.dtype)
        self._count_allreduce(tensor, compression, kind)
        return horovod.allreduce(
            tensor, op=op, name=unique_op_name(name), compression=compression,
            device_dense=self.device_dense, process_set=self.process_set,
            ignore_name_scope=True, **scale,
        )

    def _count_allreduce(self, tensor: tf.Tensor, compression: Any, kind: str | None) -> None:
        itemsize = None
        if compression is not horovod.Compression.none:
            sample, _ = compression.compress(tf.zeros((1,), tensor.dtype))
            itemsize = sample.dtype.size
        moved = allreduce_bytes(count_bytes(tensor, itemsize), self.size)
        self._count_message(kind, moved, moved)

    def grouped_allreduce(self, tensors: list[tf.Tensor], name: str, *, op: Any = horovod.Average,
                          compression: Any = horovod.Compression.none,
                          kind: str | None = None, **scale: float) -> list[tf.Tensor]:
        """Reduce several tensors as one group."""
        if any(tensor.dtype in NARROW for tensor in tensors):
            wide = [tf.cast(tensor, tf.float32) if tensor.dtype in NARROW else tensor
                    for tensor in tensors]
            reduced = self.grouped_allreduce(wide, name, op=op, compression=compression, kind=kind,
                                             **scale)
            return [tf.cast(one, tensor.dtype) for one, tensor in zip(reduced, tensors, strict=True)]
        for tensor in tensors:
            self._count_allreduce(tensor, compression, kind)
        return list(horovod.grouped_allreduce(
            tensors, op=op, name=unique_op_name(name), compression=compression,
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

    def allgather(self, tensor: tf.Tensor, name: str, *,
                  kind: str | Mapping[str, int] | None = None,
                  rows: int | None = None) -> tf.Tensor:
        """Concatenate the ranks' tensors along their first axis, whose length may differ by rank.

        ``rows`` is the length of the result where the caller knows it.
        """
        if tensor.dtype in NARROW:
            carried = self.allgather(tf.bitcast(tensor, tf.int16), name, kind=kind, rows=rows)
            return tf.bitcast(carried, tensor.dtype)
        gathered = horovod.allgather(tensor, name=unique_op_name(name), process_set=self.process_set,
                                     ignore_name_scope=True)
        if rows is not None:
            gathered = tf.ensure_shape(gathered, (rows, *tensor.shape[1:]))
        own = count_bytes(tensor)
        self._count_message(kind, (self.size - 1) * own, count_bytes(gathered) - own)
        return gathered

    def alltoall(self, tensor: tf.Tensor, splits: Any, name: str, *,
                 kind: str | Mapping[str, int] | None = None, rows: int | None = None) -> tf.Tensor:
        """Send ``splits[s]`` rows to rank s; the result is what all sent here, by rank.

        ``rows`` is the length of the result where the caller knows it.
        """
        if tensor.dtype in NARROW:
            carried = self.alltoall(tf.bitcast(tensor, tf.int16), splits, name, kind=kind, rows=rows)
            return tf.bitcast(carried, tensor.dtype)
        row = tensor.shape[1:].num_elements() * tensor.dtype.size
        own = row * (tf.cast(splits[self.rank], tf.int64) if tf.is_tensor(splits)
                     else int(splits[self.rank]))
        received, _ = horovod.alltoall(tensor, splits=tf.convert_to_tensor(splits, tf.int32),
                                       name=unique_op_name(name), process_set=self.process_set,
                                       ignore_name_scope=True)
        if rows is not None:
            received = tf.ensure_shape(received, (rows, *tensor.shape[1:]))
        self._count_message(kind, count_bytes(tensor) - own, count_bytes(received) - own)
        return received

    def broadcast(self, tensor: tf.Tensor, root: int, name: str, *,
                  kind: str = "weights") -> tf.Tensor:
        """The tensor of member ``root`` of the process set; others give one of its shape and dtype."""
        ranks = self.process_set.ranks
        sender = root if ranks is None else list(ranks)[root]
        carrier = tf.bitcast(tensor, tf.int16) if tensor.dtype in NARROW else tensor
        sent = horovod.broadcast(carrier, sender, name=unique_op_name(name), process_set=self.process_set,
                                 ignore_name_scope=True)
        count = count_bytes(tensor)
        self._count_message(kind, (self.size - 1) * count if root == self.rank else 0,
                            0 if root == self.rank else count)
        return tf.bitcast(sent, tensor.dtype) if tensor.dtype in NARROW else sent

    def all_true(self, flag: tf.Tensor, name: str) -> tf.Tensor:
        """Whether ``flag`` holds on every rank: the same decision on all ranks."""
        return self.if_distributed(
            lambda: tf.equal(self.allreduce(tf.cast(flag, tf.int32), name, op=horovod.Min,
                                            kind="agreement"), 1),
            lambda: tf.cast(flag, tf.bool),
        )

    def allgather_object(self, thing: Any, name: str) -> list[Any]:
        """Every rank's picklable ``thing``, by rank. For errors and checks, not for data."""
        if self.size == 1:
            return [thing]
        return list(horovod.allgather_object(thing, name=name, process_set=self.process_set))


def in_session_graphs() -> bool:
    """Whether this is TensorFlow 1's way: graphs that somebody runs in a ``tf.compat.v1.Session``."""
    return not tf.compat.v1.executing_eagerly_outside_functions()


def refuse_session_graphs(what: str) -> None:
    """Refuse an extension in TensorFlow 1's graphs.

    Raises:
        NotImplementedError: this is one.
    """
    if in_session_graphs():
        raise NotImplementedError(
            f"{what} in a graph of TensorFlow 1 (tf.compat.v1.Session), where nobody would initialise the "
            "state that it keeps: leave out tf.compat.v1.disable_eager_execution() and put the step into a "
            "tf.function, or leave the extension out")


def unique_op_name(name: str) -> str:
    """``name`` as Horovod takes it, made unique within the graph that is being traced.

    Two collectives under way at once must not have one name. Outside a graph each is waited for.
    Horovod takes what follows the last "/" when it ignores name scopes, so there is none.
    """
    name = "".join(letter if letter.isalnum() or letter in "_-" else "." for letter in name)
    if tf.executing_eagerly():
        return name
    graph = outermost_graph()
    names = getattr(graph, "_hvd_ext_names", None)
    if names is None:
        names = graph._hvd_ext_names = {}
    count = names[name] = names.get(name, 0) + 1
    return name if count == 1 else f"{name}_{count - 1}"


def divide_by_ranks(gradient: Any, collectives: Collectives) -> Any:
    """A gradient that stays on its rank, divided by M as its share of a mean would be."""
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values / collectives.size_op(gradient.values.dtype),
                                gradient.indices, gradient.dense_shape)
    return gradient / collectives.size_op(gradient.dtype)

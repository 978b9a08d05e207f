"""Bytes that a rank sends and receives in a step, by kind, counted while the step is traced."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

Count = Any  # an int where a size is known when a function is traced, else a 0-D int64 tensor
Counts = dict[str, list[Count]]  # (sent, received) by kind


class ScratchVariable:
    """A small vector of numbers beside any model, that may be made while a function is traced again.

    ``tf.function`` refuses a ``tf.Variable`` that is new in another trace than the first.
    """

    _numbers = itertools.count()

    def __init__(self, size: int, dtype: tf.DType = tf.int64) -> None:
        self.dtype = dtype
        with tf.init_scope(), tf.device("cpu"):
            self._handle = tf.raw_ops.VarHandleOp(
                dtype=dtype, shape=(size,), shared_name=f"hvd_ext.cell{next(self._numbers)}")
            self.assign(tf.zeros((size,), dtype))

    def assign(self, value: Any) -> None:
        """Put numbers in."""
        if not isinstance(value, tf.Tensor) or value.dtype != self.dtype:
            value = tf.cast(value, self.dtype)
        tf.raw_ops.AssignVariableOp(resource=self._handle, value=value)

    def read(self) -> tf.Tensor:
        """The numbers in it."""
        return tf.raw_ops.ReadVariableOp(resource=self._handle, dtype=self.dtype)

    def release_memory(self) -> None:
        """Give the memory back; the object is of no use afterwards."""
        with tf.init_scope():
            tf.raw_ops.DestroyResourceOp(resource=self._handle, ignore_lookup_error=True)

    def read_numbers(self) -> list[Any]:
        """The numbers in it, outside of any function."""
        return list(self.read().numpy().tolist())


def keep_alive_in_graph(values: Sequence[tf.Tensor], zero: ScratchVariable) -> None:
    """In a graph being traced: keep collectives that these come from, whose result has no other use here.

    A control dependency is not enough: TensorFlow drops those on operations without effects. ``zero`` holds
    a 0 that it does not know.
    """
    if not tf.executing_eagerly():
        tf.raw_ops.Assert(condition=tf.equal(zero.read()[0], 0), summarize=1,
                          data=[tf.reshape(value, [-1])[:1] for value in values] or [[0]])


@dataclass
class _Section:
    """What one stretch of a graph moves each time it runs."""

    graph: Any
    counts: Counts = field(default_factory=dict)


@dataclass
class _Note:
    """A traced section: ``ran_at`` is the step it last ran in, ``sizes`` what only that run knew."""

    ran_at: ScratchVariable
    sizes: ScratchVariable | None
    counts: Counts  # a number -1 - i stands for sizes[i]
    graph: Any  # a weak reference to the function's graph

    def is_gone(self) -> bool:
        """Whether the function is; what was kept for it is given back then."""
        if self.graph() is not None:
            return False
        for cell in (self.ran_at, self.sizes):
            if cell is not None:
                cell.release_memory()
        return True

    def read_counts(self) -> Counts:
        """The counts of the run, as numbers."""
        sizes = [] if self.sizes is None else self.sizes.read_numbers()
        return {kind: [count if count >= 0 else sizes[-1 - count] for count in pair]
                for kind, pair in self.counts.items()}


class StepByteCounter:
    """The bytes of the last step.

    Sizes that are known when a function is traced cost one small assignment a section and step,
    which says that the section ran. A collective in a branch is a section of its own, so that it
    counts only where the branch is taken, and branches need not wait for each other.
    """

    def __init__(self) -> None:
        self._step = ScratchVariable(1)
        self._open: list[_Section] = []
        self._notes: list[_Note] = []
        self._eager: Counts = {}
        self._eager_step = -1

    def begin_step(self) -> None:
        """A step begins."""
        self._step.assign(self._step.read() + 1)
        if tf.executing_eagerly():
            self._eager, self._eager_step = {}, self._step.read_numbers()[0]

    @contextmanager
    def count_section(self) -> Iterator[None]:
        """Collectives inside are counted together."""
        if tf.executing_eagerly():
            yield
            return
        section = _Section(tf.compat.v1.get_default_graph())
        self._open.append(section)
        try:
            yield
        finally:
            self._open.pop()
        self._note_counts(section.counts)

    def count_message(self, kind: str, sent: Count, received: Count) -> None:
        """Count one message."""
        if tf.executing_eagerly():
            _add_counts(self._eager, {kind: [sent, received]})
        elif self._open and self._open[-1].graph is tf.compat.v1.get_default_graph():
            _add_counts(self._open[-1].counts, {kind: [sent, received]})
        else:
            self._note_counts({kind: [sent, received]})

    def _note_counts(self, counts: Counts) -> None:
        if not counts:
            return
        known: Counts = {}
        found: list[tf.Tensor] = []
        for kind, pair in counts.items():
            known[kind] = []
            for count in pair:
                if not isinstance(count, int):
                    found.append(count)
                known[kind].append(count if isinstance(count, int) else -len(found))
        ran_at, sizes = ScratchVariable(1), ScratchVariable(len(found)) if found else None
        ran_at.assign(self._step.read())
        if sizes is not None:
            sizes.assign(tf.stack(found))
        self._notes = [note for note in self._notes if not note.is_gone()]  # of functions that are gone
        self._notes.append(_Note(ran_at, sizes, known, weakref.ref(outermost_graph())))

    def last_step(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes sent and received by kind in the step that began last."""
        step = self._step.read_numbers()[0]
        total: Counts = {}
        if step == 0:
            return {}, {}
        if self._eager_step == step:
            _add_counts(total, self._eager)
        for note in self._notes:
            if note.ran_at.read_numbers()[0] == step:
                _add_counts(total, note.read_counts())
        return ({kind: int(sent) for kind, (sent, _) in total.items() if sent},
                {kind: int(received) for kind, (_, received) in total.items() if received})


class NullByteCounter(StepByteCounter):
    """Counts nothing: for collectives outside of a step, and in TensorFlow 1's graphs, where nobody
    would initialise what the figures are kept in."""

    def __init__(self) -> None:
        pass

    def begin_step(self) -> None:
        pass

    @contextmanager
    def count_section(self) -> Iterator[None]:
        yield

    def count_message(self, kind: str, sent: Count, received: Count) -> None:
        pass

    def last_step(self) -> tuple[dict[str, int], dict[str, int]]:
        return {}, {}


def _add_counts(total: Counts, counts: Counts) -> None:
    for kind, (sent, received) in counts.items():
        before = total.get(kind, [0, 0])
        total[kind] = [before[0] + sent, before[1] + received]


def count_bytes(tensor: tf.Tensor, itemsize: int | None = None) -> Count:
    """Bytes of the tensor's elements; a tensor where its shape is not known yet."""
    itemsize = tensor.dtype.size if itemsize is None else itemsize
    elements = tensor.shape.num_elements()
    if elements is not None:
        return int(elements) * itemsize
    if tf.executing_eagerly():
        return int(tf.size(tensor)) * itemsize
    return tf.size(tensor, out_type=tf.int64) * itemsize


def outermost_graph() -> Any:
    """The graph of the function that is being traced, also from inside of a branch of it."""
    graph = tf.compat.v1.get_default_graph()
    while getattr(graph, "outer_graph", None) is not None and graph.outer_graph.building_function:
        graph = graph.outer_graph
    return graph

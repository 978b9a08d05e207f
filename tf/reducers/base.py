"""How gradients come together: the interface of a reducer, and the plain one.

A reducer takes this rank's gradients of some variables and returns the reduced ones. Inside a
``tf.function`` its collectives start as soon as each gradient is there, while the backward pass
still runs; in eager mode they start together.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from hvd_ext.buckets import split_groups
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.traffic import Cell
from hvd_ext.tensorflow.variables import as_tf, name_of

Gradient = tf.Tensor | tf.IndexedSlices
MakeVariable = Callable[..., tf.Variable]


class Reducer(abc.ABC):
    """Turns each rank's local gradients into the reduced gradient, the same bits on every rank."""

    stamp: Any = None  # a variable (rank, ranks) beside state that belongs to one rank

    def __init__(self, collectives: Collectives, prefix: str) -> None:
        self.collectives = collectives
        self.prefix = prefix
        self.variables: list[Any] = []
        self._functions: dict[tuple[str, ...], Any] = {}
        self._taken: Cell | None = None

    def build(self, variables: Sequence[Any], make_variable: MakeVariable) -> None:
        """Take the variables whose gradients are to be reduced, and make what state that needs.

        ``make_variable(shape, dtype, name, per_rank)`` returns a tf.Variable of zeros that the
        owner of this reducer saves and restores.
        """
        del make_variable
        self.variables = list(variables)

    def parts_shape(self) -> tuple[int, ...]:
        """Leading shape of the gradients taken: (micro-batches,) or ()."""
        return ()

    def per_rank_state(self) -> list[tf.Variable]:
        """The variables that belong to this rank alone. Here there are none."""
        return []

    def reset_per_rank_state(self) -> None:
        """Start the state of this rank anew. Here there is none."""
        return

    def inputs(self, optimizer: Any) -> dict[str, tf.Tensor]:
        """What ``reduce`` needs of an optimizer at this step, as tensors."""
        del optimizer
        return {}

    def __call__(self, gradients: Sequence[Gradient | None], variables: Sequence[Any],
                 **inputs: Any) -> tuple[list[Gradient | None], Any]:
        """The reduced gradients, None where there was none, and whether the step may be taken.

        ``inputs`` are tensors. The second result is None when it always may.
        """
        present = [index for index, gradient in enumerate(gradients) if gradient is not None]
        self.collectives.traffic.begin()
        if not present:
            return list(gradients), None
        sent = [gradients[index] for index in present]
        owners = [variables[index] for index in present]
        if tf.executing_eagerly():
            key = tuple(f"{index}.{name_of(owner)}" for index, owner in enumerate(owners))
            if key not in self._functions:
                self._functions[key] = tf.function(
                    lambda sent, inputs: self._counted(sent, owners, inputs),
                    reduce_retracing=True, autograph=False,
                )
            reduced, good = self._functions[key](sent, inputs)
        else:
            reduced, good = self._counted(sent, owners, inputs)
        result = list(gradients)
        for index, gradient in zip(present, reduced, strict=True):
            result[index] = gradient
        return result, good

    def _counted(self, gradients: list[Gradient], variables: Sequence[Any],
                 inputs: dict[str, tf.Tensor]) -> tuple[list[Gradient], Any]:
        with self.collectives.traffic.section():
            reduced, good = self.reduce(gradients, variables, **inputs)
        if good is not None:
            if self._taken is None:
                self._taken = Cell(1)
            self._taken.assign(tf.reshape(good, (1,)))
        return reduced, good

    def step_taken(self) -> bool | None:
        """Whether the last step was taken; None before it, and where it always is."""
        return None if self._taken is None else bool(self._taken.numbers()[0])

    @abc.abstractmethod
    def reduce(self, gradients: list[Gradient], variables: Sequence[Any],
               **inputs: Any) -> tuple[list[Gradient], Any]:
        """What ``__call__`` returns, for variables that have a gradient; in a graph being traced."""


class PlainReducer(Reducer):
    """Horovod's own reduction, tensor by tensor or in groups."""

    def __init__(self, collectives: Collectives, prefix: str, *, op: Any = horovod.Average,
                 compression: Any = horovod.Compression.none, sparse_as_dense: bool = False,
                 gradient_predivide_factor: float = 1.0, groups: Any = None) -> None:
        super().__init__(collectives, prefix)
        self.op = op
        self.compression = compression
        self.sparse_as_dense = sparse_as_dense
        self.groups = groups
        self.scale: dict[str, float] = {}
        if op == horovod.Average and gradient_predivide_factor != 1.0:
            self.scale = {"prescale_factor": 1.0 / gradient_predivide_factor,
                          "postscale_factor": gradient_predivide_factor}

    def reduce(self, gradients: list[Gradient], variables: Sequence[Any],
               **inputs: Any) -> tuple[list[Gradient], Any]:
        if self.sparse_as_dense:
            gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        return list(self.collectives.if_many(
            lambda: self._communicate(gradients, variables), lambda: list(gradients))), None

    def _communicate(self, gradients: list[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        options = {"op": self.op, "compression": self.compression, **self.scale}
        reduced: list[Gradient] = list(gradients)
        for number, group in enumerate(self._groups(gradients, variables)):
            if len(group) == 1:
                index = group[0]
                name = f"{self.prefix}/{name_of(variables[index])}"
                gradient = gradients[index]
                if isinstance(gradient, tf.IndexedSlices):
                    reduced[index] = self._gather(gradient, name)
                else:
                    reduced[index] = self.collectives.allreduce(gradient, name, **options)
                continue
            together = self.collectives.grouped_allreduce(
                [gradients[index] for index in group], f"{self.prefix}/group{number}", **options)
            for index, gradient in zip(group, together, strict=True):
                reduced[index] = gradient
        return reduced

    def _gather(self, gradient: tf.IndexedSlices, name: str) -> tf.IndexedSlices:
        if self.op not in (horovod.Average, horovod.Sum) or self.scale:
            raise NotImplementedError(
                f"the gradient of {name} is a tf.IndexedSlices, which is reduced with op=Average "
                "or op=Sum and without gradient_predivide_factor; pass sparse_as_dense=True")
        return self.collectives.allreduce_slices(gradient, name, op=self.op)

    def _groups(self, gradients: Sequence[Gradient], variables: Sequence[Any]) -> list[list[int]]:
        dense = [index for index, gradient in enumerate(gradients)
                 if not isinstance(gradient, tf.IndexedSlices)]
        groups = split_groups(self.groups, [variables[index] for index in dense],
                              key=lambda variable: id(as_tf(variable))) or []
        groups = [[dense[number] for number in group] for group in groups]
        grouped = {index for group in groups for index in group}
        return groups + [[index] for index in range(len(gradients)) if index not in grouped]


def divide_by_ranks(gradient: Gradient | None, collectives: Collectives) -> Gradient | None:
    """A gradient that stays on its rank, divided by M as its share of a mean would be."""
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values / collectives.size_op(gradient.values.dtype),
                                gradient.indices, gradient.dense_shape)
    return gradient / collectives.size_op(gradient.dtype)

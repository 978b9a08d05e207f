"""Horovod's own reduction. What is missing on this rank counts as zeros where another rank has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from hvd_ext.reducers.buckets import split_groups
from hvd_ext.reducers.options import DenseReduction, ReductionOptions
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reducers.base import Gradient, Reducer
from hvd_ext.tensorflow.reducers.gradient_presence import Presence
from hvd_ext.tensorflow.variables import as_tf


class PlainReducer(Reducer):
    """Reduces gradient by gradient, or group by group with ``groups=``, as Horovod does."""

    settings: DenseReduction

    def __init__(self, collectives: Collectives, settings: DenseReduction, options: ReductionOptions) -> None:
        super().__init__(collectives, settings, options)
        self.presence = Presence(collectives)
        self._somewhere: dict[int, tf.Tensor] = {}  # in the call that is being traced

    def fill_missing(self, gradients: Sequence[Gradient | None], variables: Sequence[Any]
                     ) -> list[Gradient | None]:
        """Zeros for missing gradients where there are other ranks, which may have them."""
        if not self.presence.in_use:
            return list(gradients)
        return [self.zero_gradient(variable) if gradient is None else gradient
                for gradient, variable in zip(gradients, variables, strict=True)]

    def reduce(self, gradients: list[Gradient], variables: Sequence[Any],
               **inputs: Any) -> tuple[list[Gradient], Any]:
        if self.options.sparse_as_dense:
            gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        return list(self.collectives.if_distributed(
            lambda: self._reduce_all(gradients, variables), lambda: list(gradients))), None

    def _reduce_all(self, gradients: list[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        if not self.presence.in_use:
            return self._exchange_gradients(gradients, variables)
        with tf.control_dependencies([self.check_consistency()] if self.variables else []):
            agreed, self._somewhere = self.presence.exchange_presence(gradients, variables, self.variables,
                                                          f"{self.prefix}/present")
        with tf.control_dependencies([agreed]):
            gradients = [keep_gradient(gradient) for gradient in gradients]
        return self._exchange_gradients(gradients, variables)

    def _exchange_gradients(self, gradients: list[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        """Reduce them on all ranks, which have met."""
        options = {"op": self.settings.op, "compression": self.settings.compression,
                   **self.settings.scale}
        reduced: list[Gradient] = list(gradients)
        for number, group in enumerate(self._group_gradients(gradients, variables)):
            if len(group) == 1:
                index = group[0]
                name = f"{self.prefix}/{self.collective_label(variables[index])}"
                gradient = gradients[index]
                if isinstance(gradient, tf.IndexedSlices):
                    reduced[index] = self._gather_parts(gradient, name)
                else:
                    reduced[index] = self._allreduce(gradient, name, self._somewhere.get(index), options)
                continue
            together = self.collectives.grouped_allreduce(
                [gradients[index] for index in group], f"{self.prefix}/group{number}", **options)
            for index, gradient in zip(group, together, strict=True):
                reduced[index] = gradient
        return reduced

    def _allreduce(self, gradient: tf.Tensor, name: str, somewhere: tf.Tensor | None,
                   options: dict[str, Any]) -> tf.Tensor:
        """The reduced gradient; the zeros that it is where it is missing on every rank."""
        if somewhere is None:
            return self.collectives.allreduce(gradient, name, **options)
        return tf.cond(somewhere, lambda: self.collectives.allreduce(gradient, name, **options),
                       lambda: gradient)

    def _gather_parts(self, gradient: tf.IndexedSlices, name: str) -> tf.IndexedSlices:
        if self.settings.op not in (horovod.Average, horovod.Sum) or self.settings.scale:
            raise NotImplementedError(
                f"the gradient of {name} is a tf.IndexedSlices, which is reduced with op=Average "
                "or op=Sum and without gradient_predivide_factor; pass sparse_as_dense=True")
        return self.collectives.allreduce_slices(gradient, name, op=self.settings.op)

    def _group_gradients(self, gradients: Sequence[Gradient], variables: Sequence[Any]) -> list[list[int]]:
        dense = [index for index, gradient in enumerate(gradients)
                 if not isinstance(gradient, tf.IndexedSlices)]
        groups = split_groups(self.options.groups, [variables[index] for index in dense],
                              key=lambda variable: id(as_tf(variable))) or []
        groups = [[dense[number] for number in group] for group in groups]
        grouped = {index for group in groups for index in group}
        return groups + [[index] for index in range(len(gradients)) if index not in grouped]


def keep_gradient(gradient: Gradient) -> Gradient:
    """The gradient, after the operations that a graph waits for here."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(tf.identity(gradient.values), tf.identity(gradient.indices),
                                gradient.dense_shape)
    return tf.identity(gradient)

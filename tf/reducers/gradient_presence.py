"""Which variables have a gradient on which rank: agreed on before any gradient is exchanged.

A rank knows when a function is traced what is missing there, but not what is missing elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from hvd_ext.tensorflow.byte_counts import ScratchVariable
from hvd_ext.tensorflow.collectives import Collectives, in_session_graphs
from hvd_ext.tensorflow.variables import as_tf, name_of

# What a rank says of a variable; the sum over the ranks has how many say what.
MISSING, DENSE, SPARSE, LEFT_OUT = 0, 1, 1 << 20, 1 << 40
MASK = SPARSE - 1
DIFFERENT_VARIABLES = (
    "the ranks do not train the same variables at this step: make the same layers trainable on every rank, "
    "and give every rank's optimizer or tape the same variables;")


class Presence:
    """One small sum a step over the ranks, for one reducer.

    Attributes:
        missing: the variables, by id, that zeros stand for in this step. Gradients of earlier passes may
            have been added to them.
    """

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives
        self.missing: set[int] = set()
        self._zero: ScratchVariable | None = None
        self._found: dict[int, ScratchVariable] = {}

    @property
    def in_use(self) -> bool:
        """Whether there are other ranks to agree with. Under elastic it cannot be known for long."""
        return bool(not self.collectives.is_elastic and not in_session_graphs()
                    and self.collectives.process_set.included() and self.collectives.size > 1)

    def exchange_presence(self, gradients: Sequence[Any], variables: Sequence[Any], planned: Sequence[Any],
                          name: str
                          ) -> tuple[tf.Tensor, dict[int, tf.Tensor]]:
        """A check to wait for, and of each missing variable, by place, whether some rank has its gradient.

        Args:
            gradients: of ``variables``, none of them None.
            variables: what this rank was given.
            planned: what it may be given, the same on every rank; if empty, anything.
            name: of the collective.
        """
        zero = self._zero = self._zero or ScratchVariable(1)
        given = {id(as_tf(variable)): gradient for variable, gradient
                 in zip(variables, gradients, strict=True)}
        everything = list(planned) or list(variables)
        said = [self._presence_flag(variable, given) for variable in everything]
        total = self.collectives.allreduce(tf.stack(said) + zero.read(), name, op=horovod.Sum,
                                           kind="agreement")
        total = tf.ensure_shape(total, (len(everything),))
        left_out, sparse = total // LEFT_OUT, (total // SPARSE) % SPARSE
        dense, ranks = total & MASK, self.collectives.size
        found = tf.greater(dense + sparse, 0)
        names = tf.constant([name_of(variable) for variable in everything])
        bad = tf.logical_and(left_out > 0, left_out < ranks)
        alike = tf.debugging.Assert(tf.logical_not(tf.reduce_any(bad)), [
            DIFFERENT_VARIABLES, "on some ranks only:", tf.boolean_mask(names, bad)], summarize=20)
        with tf.control_dependencies([] if alike is None else [alike]):
            mixed = tf.logical_and(sparse > 0, sparse + left_out < ranks)
        kinds = tf.debugging.Assert(tf.logical_not(tf.reduce_any(mixed)), [
            "gradients are tf.IndexedSlices on some ranks, and dense or missing on others; pass "
            "sparse_as_dense=True:", tf.boolean_mask(names, mixed)], summarize=20)
        checks = [tf.identity(found)]
        if planned:
            checks.append(tf.debugging.Assert(tf.reduce_any(found), [
                "no gradients provided for any variable, on any rank; is the loss computed from the model's "
                "output, inside of the tape?"]))
        with tf.control_dependencies([one for one in (kinds, *checks) if one is not None]):
            found = tf.identity(found)
        self._keep_found(everything, found)
        place = {id(as_tf(variable)): number for number, variable in enumerate(everything)}
        return found, {index: found[place[id(as_tf(variable))]] for index, variable in enumerate(variables)
                       if id(as_tf(variable)) in self.missing}

    def _presence_flag(self, variable: Any, given: dict[int, Any]) -> tf.Tensor:
        key = id(as_tf(variable))
        if key not in given:
            return tf.constant(LEFT_OUT, tf.int64)
        if isinstance(given[key], tf.IndexedSlices):
            return tf.constant(SPARSE, tf.int64)
        if key in self.missing:
            any_other = tf.reduce_any(tf.not_equal(given[key], 0))
            return tf.where(any_other, tf.constant(DENSE, tf.int64), tf.constant(MISSING, tf.int64))
        return tf.constant(DENSE, tf.int64)

    def _keep_found(self, everything: Sequence[Any], found: tf.Tensor) -> None:
        for number, variable in enumerate(everything):
            key = id(as_tf(variable))
            if key in self.missing:
                if key not in self._found:
                    self._found[key] = ScratchVariable(1)
                self._found[key].assign(found[number:number + 1])

    def is_somewhere(self, variable: Any) -> tf.Tensor:
        """Whether any rank had a missing variable's gradient in the last exchange, 0-D; True before it."""
        found = self._found.get(id(as_tf(variable)))
        return tf.constant(True) if found is None else tf.not_equal(found.read()[0], 0)

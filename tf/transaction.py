"""A tape's step as a transaction: where its gradients are thrown away, what it keeps between steps goes back.

A tape does not see its gradients being applied. The optimizer given to it counts updates: where that count is
what it was at the last reduction when the next one begins, nothing was applied.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hvd_ext.tensorflow.variables import create_outside_graph

ASKED = "_hvd_ext_asked"  # of a tape: for which states its gradients were taken
STAMP = "rank_and_ranks"
TAKEN_BACK = (
    "hvd_ext: a distributed tape gives gradients again before an update has used those that it gave before, "
    "whose trace in residuals and counters is removed. That is right where they are thrown away. To add up "
    "the gradients of several batches, pass backward_passes_per_step= to hvd.DistributedOptimizer and leave "
    "the tape plain")


class Transaction:
    """The values from before the last reduction, beside the state that it has changed.

    Both are in checkpoints, so that a run goes on alike from between a reduction and the next.
    """

    def __init__(self) -> None:
        self._made: list[tuple[tf.Variable, str, bool]] = []
        self._state: list[tuple[tf.Variable, tf.Variable]] = []  # and its value from before
        self._counters: list[tuple[tf.Variable, tf.Variable]] = []  # those of steps taken
        self._told: Any = None  # whether the message about gradients that were thrown away was printed
        self.reduced_at: Any = None  # updates at the last reduction + 1, or `_not_taken_at`; 0 for none
        self._pending: list[Any] = []  # what keeps its values from before itself

    def record_variables(self, make: Callable[..., tf.Variable]) -> Callable[..., tf.Variable]:
        """``make``, and the variables that it makes are the state."""
        def make_and_record(shape: Sequence[int], dtype: Any, name: str, per_rank: bool) -> tf.Variable:
            variable = make(shape, dtype, name, per_rank)
            if name != STAMP:
                self._made.append((variable, name, per_rank))
            return variable

        return make_and_record

    def create_variables(self, make: Callable[..., tf.Variable], steps: Any) -> None:
        """Make the variables for the values from before, and the one that counts.

        Args:
            make: as a reducer's ``build`` is given it.
            steps: the state that counts steps taken, if there is one.
        """
        for variable, name, per_rank in self._made:
            self._add_variable(variable,
                               make(tuple(variable.shape), variable.dtype, f"{name}_before", per_rank),
                               counts=variable is steps)
        self._make_own(lambda: make((), tf.int64, "reduced_at", False))

    def add_variables(self, variables: Sequence[tf.Variable], steps: tf.Variable, pending: Any) -> None:
        """Take further state, whose values from before are in no checkpoint.

        Args:
            variables: the state.
            steps: the one of them that counts steps taken.
            pending: further state, with ``take_back()`` and ``commit()``.
        """
        known = {id(variable) for variable, _ in self._state}
        for variable in variables:
            if id(variable) not in known:
                before = tf.Variable(variable.read_value(), trainable=False, shape=variable.shape)
                self._add_variable(variable, before, counts=variable is steps)
        self._pending.append(pending)
        self._make_own(lambda: tf.Variable(0, dtype=tf.int64, trainable=False))

    def _add_variable(self, variable: tf.Variable, before: tf.Variable, *, counts: bool) -> None:
        self._state.append((variable, before))
        if counts:
            self._counters.append((variable, before))

    def _make_own(self, make: Callable[[], tf.Variable]) -> None:
        if self.reduced_at is None:
            self.reduced_at = make()
            self._told = create_outside_graph(lambda: tf.Variable(False, trainable=False))

    def has_variable(self, variable: tf.Variable) -> bool:
        """Whether the variable is part of the state."""
        return any(variable is one for one, _ in self._state)

    def value_before(self, variable: tf.Variable) -> tf.Variable:
        """The variable that holds a state's value from before the last reduction."""
        return next(before for one, before in self._state if one is variable)

    def begin_reduction(self, updates: tf.Tensor, scale: tf.Tensor) -> None:
        """Before a reduction: take back the last one if its gradients were not used.

        Args:
            updates: how many the optimizer has made, 0-D int64.
            scale: of the loss, 0-D float32: gradients that are not finite are used where they lower it.
        """
        def take_back() -> tf.Tensor:
            for variable, before in self._state:
                variable.assign(before.read_value())
            for one in self._pending:
                one.take_back()
            tf.cond(self._told.read_value(), lambda: tf.constant(True), self._tell_once)
            return tf.constant(True)

        def commit() -> tf.Tensor:
            for one in self._pending:
                one.commit()
            return tf.constant(False)

        at = self.reduced_at.read_value()
        unused = tf.logical_or(tf.equal(at, updates + 1), tf.equal(at, _not_taken_at(updates, scale)))
        tf.cond(unused, take_back, commit)
        for variable, before in self._state:
            before.assign(variable.read_value())

    def _tell_once(self) -> tf.Tensor:
        tf.print(TAKEN_BACK, output_stream=sys.stderr)
        return self._told.assign(True).read_value()

    def end_reduction(self, updates: tf.Tensor, scale: tf.Tensor) -> None:
        """After a reduction: it can be taken back; the arguments are those of :meth:`begin_reduction`."""
        taken = tf.reduce_any(tf.stack([tf.not_equal(variable.read_value(), before.read_value())
                                        for variable, before in self._counters] or [True]))
        self.reduced_at.assign(tf.where(taken, updates + 1, _not_taken_at(updates, scale)))


def _not_taken_at(updates: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """``reduced_at`` of gradients that are not finite: below 0, other with each update and scale."""
    return -((updates + 1) * 2**32 + tf.cast(tf.bitcast(tf.cast(scale, tf.float32), tf.int32), tf.int64))


def ask_once(tape: Any, key: tuple[int, ...], what: str) -> None:
    """Note that a tape's gradients are taken with the state ``key``.

    Raises:
        RuntimeError: they were before: a persistent tape.
    """
    asked = tape.__dict__.setdefault(ASKED, set())
    if key in asked:
        raise RuntimeError(
            f"gradient() a second time on one tape with {what}, which keeps one state for one gradient a "
            "step: take the gradient of the sum of the losses, or give each loss a distributed tape with an "
            "optimizer= of its own")
    asked.add(key)

"""Gradients that are exchanged beside the next step's compute, over any reducer:
``overlap=hvd.DelayedUpdate(...)``.

reduce what the last step kept -> compensate it -> hand it out -> keep this step's

A graph's collectives end with it, so none is on its way between steps. What a step reduces is what the last
one kept in variables: nothing of this step comes before it, and it runs beside the forward and backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvd_ext.consistency.fingerprint import Fingerprint, describe_settings
from hvd_ext.reducers.delay_compensation import DelayedUpdate
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.state import MEAN, RANK, Part
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reducers.base import Gradient, MakeVariable, Reducer
from hvd_ext.tensorflow.reducers.buckets import OTHER_STATES, read_counter
from hvd_ext.tensorflow.reducers.declared_state import StateVariable
from hvd_ext.tensorflow.reducers.gradient_presence import DIFFERENT_VARIABLES
from hvd_ext.tensorflow.reducers.kernels.delay_compensation import accumulation_dtype
from hvd_ext.tensorflow.reducers.kernels.delayed_update import compensate_gradient
from hvd_ext.tensorflow.uneven_data import JOIN_BLOCKERS
from hvd_ext.tensorflow.variables import as_tf, name_of

WAITS, UPDATES = Part("late_waits"), Part("late_updates")
GRADIENT = Part("late_gradient", RANK, "delayed gradients", resize=MEAN)  # not reduced yet
WEIGHTS, MEAN_SQUARE = Part("late_weights"), Part("late_mean_square")


class DelayedReducer(Reducer):
    """Hands out what the reducer ``inner`` would have handed out one step before.

    The first step hands out nothing, and is not taken.

    Args:
        inner: how gradients are reduced.
        overlap: the strength of the compensation.
        options: what every way to reduce is given.
    """

    saved_as = "LateReducer"  # in checkpoints

    staleness = 1

    def __init__(self, inner: Reducer, overlap: DelayedUpdate, options: ReductionOptions) -> None:
        super().__init__(inner.collectives, inner.settings, options)
        JOIN_BLOCKERS[self] = "overlap="
        self.inner = inner
        self.overlap = overlap
        self.flushing = False  # the step being traced, or run, keeps no gradient
        self.waits: Any = None  # 1 while a gradient waits to be reduced
        self.updates: Any = None
        self.kept: list[tf.Variable] = []  # this rank's gradients of the last step
        self.before: list[tf.Variable] = []  # the weights at which they were taken
        self.mean_square: list[tf.Variable] = []

    def create_state(self, variables: Sequence[Any], make_variable: MakeVariable) -> None:
        super().create_state(variables, make_variable)
        self.inner.create_state(variables, make_variable)
        self.stamp = self.inner.stamp
        if self.stamp is None:
            self.stamp = make_variable((2,), tf.int64, "rank_and_ranks", True)
        self.waits = self.make_part(make_variable, WAITS)
        self.updates = self.make_part(make_variable, UPDATES)
        for number, variable in enumerate(variables):
            shape, dtype = tuple(variable.shape), as_tf(variable).dtype
            self.kept.append(self.make_part(make_variable, GRADIENT, shape, dtype, number))
            if self.overlap.lam > 0:
                self.before.append(self.make_part(make_variable, WEIGHTS, shape, dtype, number))
            if self.overlap.keeps_mean_square:
                self.mean_square.append(self.make_part(make_variable, MEAN_SQUARE, shape,
                                                       accumulation_dtype(dtype), number))

    def _make_own(self) -> None:
        super()._make_own()
        self.inner._checked = self._checked  # the ranks meet once

    def fill_missing(self, gradients: Sequence[Gradient | None], variables: Sequence[Any]
                     ) -> list[Gradient | None]:
        """Zeros for missing gradients: what waits is of all variables.

        Raises:
            ValueError: these are not the variables that the exchange was planned for.
        """
        self.check_variables(variables, "overlap=")
        return [self.zero_gradient(variable) if gradient is None else gradient
                for gradient, variable in zip(gradients, variables, strict=True)]

    def __call__(self, gradients: Sequence[Gradient | None], variables: Sequence[Any],
                 **inputs: Any) -> tuple[list[Gradient | None], Any]:
        return super().__call__(self.fill_missing(gradients, variables), variables, **inputs)

    def step_inputs(self, optimizer: Any) -> dict[str, tf.Tensor]:
        return {**self.inner.step_inputs(optimizer), "flush": tf.constant(self.flushing)}

    # The step

    def sent_now(self, gradients: list[Gradient]) -> list[Gradient]:
        return []  # the exchange is of the last step's

    def reduce(self, gradients: list[Gradient], variables: Sequence[Any],
               **inputs: Any) -> tuple[list[Gradient], Any]:
        flush = inputs.pop("flush")
        self.check_variables(variables, "overlap=")
        places = [self._number[id(as_tf(variable))] for variable in variables]
        sent = [self._dense_gradient(*pair) for pair in zip(gradients, variables, strict=True)]

        def nothing() -> tuple[list[tf.Tensor], tf.Tensor]:
            return [tf.zeros(one.shape, one.dtype) for one in sent], tf.constant(False)

        arrived, good = tf.cond(self._agreed_to_wait(),
                                functools.partial(self._exchange_gradients, places, variables, inputs),
                                nothing)
        if self.overlap.lam > 0:
            finite = [tf.reduce_all(tf.math.is_finite(one)) for one in arrived]
            arrived = tf.cond(tf.logical_and(good, tf.reduce_all(finite)),
                              functools.partial(self._compensate, arrived, places, variables),
                              lambda: arrived)
        self.updates.assign_add(tf.cast(good, tf.int64))
        self._keep_state(sent, places, variables)
        self.waits.assign(1 - tf.cast(flush, tf.int64))
        return list(arrived), good

    def _dense_gradient(self, gradient: Gradient, variable: Any) -> tf.Tensor:
        if isinstance(gradient, tf.IndexedSlices) and not self.options.sparse_as_dense:
            raise ValueError(f"the gradient of {name_of(variable)} is a tf.IndexedSlices, which overlap= "
                             "cannot "
                             "take; pass sparse_as_dense=True")
        # A trace for batches of several sizes does not know how many rows a sparse gradient has.
        return tf.cast(tf.ensure_shape(tf.convert_to_tensor(gradient), variable.shape), as_tf(variable).dtype)

    def _agreed_to_wait(self) -> tf.Tensor:
        """Whether a gradient waits, 0-D; an error on all ranks where it does not on all of them."""
        ranks = self.collectives.size
        if ranks == 1:
            return tf.equal(self.waits, 1)
        own = tf.reduce_all(tf.equal(self.stamp, tf.constant([self.collectives.rank, ranks], tf.int64)))
        with tf.control_dependencies([self.check_consistency()]):
            row = tf.stack([tf.cast(own, tf.int64), self.waits.read_value(), self.updates.read_value(),
                            tf.constant(self.left_out_number(), tf.int64)])
        rows = self.collectives.allgather(row[None], f"{self.prefix}/delayed_update/agree", kind="agreement",
                                          rows=ranks)
        fine = tf.logical_and(tf.reduce_all(rows[:, 0] == 1), tf.reduce_all(rows[:, 1:3] == rows[0, 1:3]))
        check = tf.debugging.Assert(fine, [
            f"{OTHER_STATES}; or some ranks alone called flush(); (own state, one waits, updates) by rank:",
            rows[:, :3]])
        alike = tf.debugging.Assert(tf.reduce_all(rows[:, 3] == rows[0, 3]),
                                    [DIFFERENT_VARIABLES, rows[:, 3]])
        with tf.control_dependencies([one for one in (check, alike) if one is not None]):
            return tf.equal(rows[0, 1], 1)

    def _exchange_gradients(self, places: Sequence[int], variables: Sequence[Any],
                            inputs: dict[str, tf.Tensor]
                            ) -> tuple[list[tf.Tensor], tf.Tensor]:
        kept = [self.kept[place].read_value() for place in places]
        reduced, good = self.inner.reduce(kept, variables, **inputs)
        return [tf.convert_to_tensor(one) for one in reduced], tf.constant(True) if good is None else good

    def _compensate(self, gradients: Sequence[tf.Tensor], places: Sequence[int], variables: Sequence[Any]
                    ) -> list[tf.Tensor]:
        result = []
        for gradient, place, variable in zip(gradients, places, variables, strict=True):
            square = self.mean_square[place] if self.mean_square else None
            corrected, after = compensate_gradient(
                gradient, as_tf(variable).read_value(), self.before[place].read_value(),
                None if square is None else square.read_value(), self.overlap)
            if square is not None:
                square.assign(after)
            result.append(corrected)
        return result

    def _keep_state(self, gradients: Sequence[tf.Tensor], places: Sequence[int],
                    variables: Sequence[Any]) -> None:
        for gradient, place, variable in zip(gradients, places, variables, strict=True):
            self.kept[place].assign(gradient)
            if self.before:
                self.before[place].assign(as_tf(variable).read_value())
        for place in self.left_out:  # frozen now: its gradient that waited is dropped
            self.kept[place].assign(tf.zeros_like(self.kept[place]))

    # What must be the same on every rank

    @property
    def extensions(self) -> tuple[str, ...]:  # type: ignore[override]
        """Lines about what comes after the reduction, to be compared."""
        return self.inner.extensions

    @extensions.setter
    def extensions(self, lines: tuple[str, ...]) -> None:
        self.inner.extensions = lines

    def build_fingerprint(self) -> Fingerprint:
        return Fingerprint((*self.inner.build_fingerprint().lines,
                            *(f"overlap: {line}" for line in describe_settings(self.overlap))))

    # State

    def declared_state(self) -> list[StateVariable]:
        return [*self.inner.declared_state(), *self._state]

    def reset_per_rank_state(self) -> None:
        super().reset_per_rank_state()
        for variable in (*self.mean_square, self.waits, self.updates):
            variable.assign(tf.zeros_like(variable))

    # Under Horovod elastic

    @property
    def lost_ranks(self) -> int:  # type: ignore[override]
        """How many left with what they kept alone."""
        return self.inner.lost_ranks

    @lost_ranks.setter
    def lost_ranks(self, ranks: int) -> None:
        self.inner.lost_ranks = ranks

    def gather_state(self, collectives: Collectives) -> None:
        self.inner.gather_state(collectives)

    def abort_step(self) -> None:
        super().abort_step()
        self.inner.abort_step()

    def rebuild_for_world_size(self) -> None:
        super().rebuild_for_world_size()
        self.inner.rebuild_for_world_size()

    def report(self) -> dict[str, Any]:
        self.inner._taken = self._taken
        held = sum(int(one.shape.num_elements()) * one.dtype.size
                   for one in (*self.kept, *self.before, *self.mean_square))
        updates = read_counter(self.updates)
        return {**self.inner.report(), "steps": updates, "overlap": {"updates": updates, "bytes_held": held}}

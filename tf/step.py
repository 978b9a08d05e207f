"""A Keras optimizer whose gradients are reduced over the ranks: the step, and the state around it.

Keras 3 hands gradients to ``optimizer.apply`` and nowhere else, whether they come from
``model.fit``, a ``train_step`` or ``apply_gradients``. They are reduced at the last moment before
they are clipped: after Keras has unscaled them, dropped missing ones and accumulated
``gradient_accumulation_steps`` of them, so that each of these works as in one process.

The way of a gradient is :class:`Step`, from top to bottom; ``distributed_optimizer_class.py`` only connects
it to Keras' methods.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import horovod.tensorflow as horovod
import keras
import tensorflow as tf

from hvd_ext.tensorflow import keras_hooks
from hvd_ext.tensorflow.belonging import find_belonging
from hvd_ext.tensorflow.collectives import divide_by_ranks
from hvd_ext.tensorflow.persistence import elastic_snapshot, keras_checkpoint_layout
from hvd_ext.tensorflow.reducers.base import (
    Reducer,
    before_reduce,
    precondition_gradients,
    report,
)
from hvd_ext.tensorflow.sharding.updater import ShardedUpdater, server_report
from hvd_ext.tensorflow.uneven_data import JOIN_BLOCKERS
from hvd_ext.tensorflow.variables import as_tf, make_state, mark_per_rank, name_of


class Step:
    """One call of ``apply``: gather over passes -> reduce -> precondition -> update. It lives as long.

    Keras' own part of a step runs between ``reduce`` and ``update``: clipping, weight decay, averages of
    weights. ``good`` says whether the update may be made: a 0-D bool once reduced, None when always.
    """

    def __init__(self, wrapper: Wrapper, optimizer: Any, variables: Sequence[Any]) -> None:
        self.wrapper = wrapper
        self.optimizer = optimizer
        self.variables = variables
        self.reduced = False
        self.good: Any = None
        self.decay: Any = None  # of weights, where the update is to do it

    def run_step(self, gradients: Sequence[Any], apply: Callable[..., None]) -> None:
        """The whole step; ``apply`` is the wrapped optimizer's."""
        presence = self.wrapper.reducer.presence
        if presence is not None:
            presence.missing = {id(as_tf(variable)) for gradient, variable
                                in zip(gradients, self.variables, strict=True) if gradient is None}
        gradients = self._reduce_overwrites(list(gradients))
        if self.wrapper.scaling is not None:  # hvd.uneven_inputs
            gradients = self.wrapper.scaling.scale_local(gradients, self.variables)
        if self.wrapper.options.passes > 1:
            self._accumulate(gradients, apply)
        else:
            self._apply_gradients(gradients, apply)
        self.wrapper.end_pass()

    def _fill_missing(self, gradients: list[Any]) -> list[Any]:
        """Zeros where a reducer needs them: Keras would leave such variables out."""
        far = self._reduced_numbers()
        filled = self.wrapper.reducer.fill_missing([gradients[index] for index in far],
                                                   [self.variables[index] for index in far])
        for index, gradient in zip(far, filled, strict=True):
            gradients[index] = gradient
        return gradients

    def _reduced_numbers(self) -> list[int]:
        """The variables whose gradients are reduced, by number."""
        return [index for index, variable in enumerate(self.variables)
                if id(as_tf(variable)) not in self.wrapper.local]

    def _reduce_overwrites(self, gradients: list[Any]) -> list[Any]:
        """Gradients that Keras writes into their variables as they are (float8 scales): the maximum."""
        collectives = self.wrapper.collectives
        for index, (gradient, variable) in enumerate(zip(gradients, self.variables, strict=True)):
            if gradient is None or not getattr(variable, "overwrite_with_gradient", False):
                continue
            name = f"{self.wrapper.reducer.prefix}/overwrite/{name_of(variable)}"
            maximum: Callable[[], Any] = functools.partial(
                collectives.allreduce, gradient, name, op=horovod.Max)
            gradients[index] = collectives.if_distributed(maximum, functools.partial(tf.identity, gradient))
        return gradients

    def _accumulate(self, gradients: Sequence[Any], apply: Callable[..., None]) -> None:
        """Horovod's backward_passes_per_step: sum here, go on with the last pass."""
        wrapper, options = self.wrapper, self.wrapper.options
        apart = bool(wrapper.reducer.parts_shape())  # each pass is a worker of its own
        sums: list[Any] = []
        for gradient, variable in zip(gradients, self.variables, strict=True):
            total = wrapper.sums[self.optimizer._var_key(variable)]
            if isinstance(gradient, tf.IndexedSlices):
                if not options.sparse_as_dense:
                    raise ValueError(
                        f"the gradient of {name_of(variable)} is a tf.IndexedSlices, which cannot "
                        "be summed over backward_passes_per_step; pass sparse_as_dense=True")
                gradient = tf.convert_to_tensor(gradient)
            if gradient is not None and apart:
                now = tf.equal(tf.range(options.passes, dtype=tf.int64), wrapper.counter)
                now = tf.reshape(now, (-1, *[1] * len(gradient.shape)))
                total.assign(tf.where(now, tf.cast(gradient, total.dtype)[None], total))
            elif gradient is not None:
                total.assign_add(tf.cast(gradient, total.dtype))
            sums.append(total if gradient is not None or self._in_doubt(variable) else None)
        done = wrapper.counter.assign_add(1)

        def last_pass() -> None:
            divisor = options.passes if options.average_passes and not apart else 1
            self._apply_gradients([None if total is None else total / divisor for total in sums], apply)
            wrapper.forget_passes()

        def other_pass() -> None:
            self.optimizer._iterations.assign_add(1)

        keras.ops.cond(tf.greater_equal(done, options.passes), last_pass, other_pass)

    def _apply_gradients(self, gradients: Sequence[Any], apply: Callable[..., None]) -> None:
        """Into Keras, which comes back with the gradients to ``reduce`` and to ``update``."""
        gradients = self._fill_missing(list(gradients))
        if not self.wrapper.standard:  # one that has its own way from ``apply`` to its update
            gradients = self.reduce_gradients(gradients)
        undo = [self._undo_of(variable) for variable in self.variables if self._in_doubt(variable)]
        undo += [self._undo_of(variable, always=True) for variable in self._left_out_of_replies()]
        apply(gradients, self.variables)
        for put_back in undo:
            put_back()
        if not (self.reduced or self._accumulates_eagerly()):
            raise RuntimeError("the wrapped optimizer updated its variables without passing the "
                               "gradients on to be reduced; please report this optimizer")

    def _in_doubt(self, variable: Any) -> bool:
        """Whether the variable's gradient is missing here, and may be on all ranks."""
        reducer = self.wrapper.reducer
        return bool(reducer.is_missing(variable) and reducer.presence.in_use
                    and id(as_tf(variable)) not in self.wrapper.local)

    def _left_out_of_replies(self) -> list[Any]:
        """Variables that are not to be trained now, where compressed replies bring what they still lack."""
        server = self.wrapper.server
        if server is None or server.replies is None or not server.replies.active:
            return []
        given = {id(as_tf(variable)) for variable in self.variables}
        return [one for one in server.replies.variables if id(as_tf(one)) not in given]

    def _undo_of(self, variable: Any, *, always: bool = False) -> Callable[[], None]:
        """Put the variable and its moments back: ``always``, or if its gradient is missing on all ranks.

        Keras leaves out what has no gradient; whether any rank has one is known too late for that.
        """
        presence, references = self.wrapper.reducer.presence, self.wrapper.references
        held = [as_tf(variable)]
        for one in map(as_tf, self.optimizer.variables):
            reference, kind = references.get(id(one), (None, ""))
            if reference is not None and as_tf(reference) is held[0] \
                    and kind not in (keras_checkpoint_layout.ACCUMULATOR, keras_checkpoint_layout.AVERAGE):
                held.append(one)
        before = [one.read_value() for one in held]

        def put_back() -> None:
            for one, value in zip(held, before, strict=True):
                one.assign(value)

        if always:
            return put_back
        return lambda: keras.ops.cond(presence.is_somewhere(variable), lambda: None, put_back)

    def _accumulates_eagerly(self) -> bool:
        """Whether Keras may only have added to its accumulators: a graph has the update in a branch."""
        return bool(self.wrapper.standard and self.optimizer.gradient_accumulation_steps
                    and tf.executing_eagerly())

    def reduce_gradients(self, gradients: Sequence[Any]) -> list[Any]:
        """The gradients over all ranks, preconditioned; those of local variables scaled if asked."""
        keras_hooks.refuse_xla("hvd.DistributedOptimizer")
        wrapper, reducer = self.wrapper, self.wrapper.reducer
        self.reduced = True
        result = list(gradients)
        far = self._reduced_numbers()
        variables, mine = ([every[index] for index in far] for every in (self.variables, gradients))
        if wrapper.options.passes == 1 and not self.optimizer.gradient_accumulation_steps:
            before_reduce(wrapper.preconditioner, mine, variables)
        reduced, self.good = reducer(mine, variables, **reducer.step_inputs(self.optimizer))
        if wrapper.scaling is not None:
            reduced = wrapper.scaling.scale_reduced(reduced)
        reduced = precondition_gradients(wrapper.preconditioner, reduced, variables, reducer, self.good)
        for index, gradient in zip(far, reduced, strict=True):
            result[index] = gradient
        if wrapper.scale_local and wrapper.local:
            for index in set(range(len(result))) - set(far):
                result[index] = divide_by_ranks(result[index], wrapper.collectives)
        return result

    def reduce_and_apply(self, gradients: Sequence[Any], apply: Callable[..., None]) -> None:
        """Keras' ``_backend_apply_gradients``: all that follows, or nothing in a step that is skipped."""
        if not self.wrapper.standard or self.optimizer.gradient_accumulation_steps:
            apply(gradients, self.variables)  # reduced already; or in ``reduce_accumulated``
            return
        reduced = self.reduce_gradients(gradients)
        if self.good is None:
            apply(reduced, self.variables)
            return
        good, self.good = self.good, None  # decided here, for the whole of it

        def skip() -> None:
            # A step that is not taken is not counted, nor are its passes.
            self.optimizer._iterations.assign_sub(self.wrapper.options.passes)

        keras.ops.cond(good, lambda: apply(reduced, self.variables), skip)

    def reduce_accumulated(self, gradients: Sequence[Any]) -> Sequence[Any]:
        """The mean over ``gradient_accumulation_steps``, reduced, in the step that updates."""
        if self.wrapper.standard and self.optimizer.gradient_accumulation_steps:
            return self.reduce_gradients(gradients)
        return gradients

    def flush(self, apply: Callable[..., None]) -> None:
        """A step without a gradient of its own: takes the update of those that are late."""
        reducer = self.wrapper.reducer
        self.optimizer._iterations.assign_add(self.wrapper.options.passes - 1)  # as many as a step's
        reducer.flushing = True
        try:
            self._apply_gradients([reducer.zero_gradient(variable) for variable in self.variables], apply)
        finally:
            reducer.flushing = False

    def apply_update(self, update: Callable[..., None], gradients: Sequence[Any], variables: Sequence[Any],
                     learning_rate: Any) -> None:
        """The wrapped optimizer's update of the variables, on the ranks where it belongs."""
        server = self.wrapper.server

        def run(some: Sequence[Any], owned: Sequence[Any]) -> None:
            if self.decay is not None:
                self.decay(owned)
            update(some, owned, learning_rate)

        self.if_good(lambda: run(gradients, variables) if server is None else server.update_owned(
            run, gradients, variables, self.wrapper.reducer.prefix))

    def if_good(self, change: Callable[[], None]) -> None:
        """Change weights, unless this step is to be skipped."""
        if self.good is None:
            change()
        else:
            keras.ops.cond(self.good, change, lambda: None)


class Wrapper:
    """What a distributed optimizer has beyond the wrapped one, under ``optimizer._hvd_ext``."""

    def __init__(self, reducer: Reducer, *, standard: bool, scale_local: bool, preconditioner: Any,
                 server: ShardedUpdater | None, where: str | None, reset_per_rank_state: bool) -> None:
        self.reducer = reducer
        self.collectives = reducer.collectives
        self.options = reducer.options
        self.scale_local = scale_local
        self.preconditioner = preconditioner
        self.server = server
        self.where = where
        self.given: dict[str, Any] = {}  # the arguments of DistributedOptimizer, for copies
        self.server_stamp: Any = None
        self.reset_per_rank_state = reset_per_rank_state
        self.loaded: tuple[str, int] | None = None  # whose state a file gave, and the iterations then
        self.local: set[int] = set()
        self.counter: Any = None
        self.sums: dict[str, Any] = {}
        self.standard = standard
        self.step: Step | None = None
        self.scaling: Any = None  # of gradients, by ``hvd.uneven_inputs``
        if preconditioner is not None:
            JOIN_BLOCKERS[self] = type(preconditioner).__name__
        self.plain_count: int | None = None  # variables that the wrapped optimizer has itself
        self.references: dict[int, tuple[Any, str]] = {}  # of the optimizer's variables, by id

    @contextlib.contextmanager
    def new_step(self, optimizer: Any, variables: Sequence[Any]) -> Iterator[Step]:
        """The step that Keras' methods belong to until the block ends."""
        outer, self.step = self.step, Step(self, optimizer, variables)
        try:
            yield self.step
        finally:
            self.step = outer

    def create_state(self, optimizer: Any, variables: Sequence[Any]) -> None:
        """Make the state that reduction and accumulation over passes need, in the optimizer."""
        self.plain_count = len(optimizer.variables)
        if self.server is not None:
            find_belonging(optimizer, variables)
        make = functools.partial(make_state, optimizer)
        self.reducer.create_state([one for one in variables if id(as_tf(one)) not in self.local], make)
        if self.server is not None:
            self.server_stamp = self.server.make_state(optimizer, make, self.references)
        self.stamp_rank()
        accumulated = getattr(optimizer, "_accumulated_gradients", ())
        for total, variable in zip(accumulated, variables, strict=False):
            self.references[id(as_tf(mark_per_rank(total)))] = variable, keras_checkpoint_layout.ACCUMULATOR
        if self.options.passes > 1:
            parts = self.reducer.parts_shape()
            self.counter = make((), "int64", "passes_done", False)
            for number, variable in enumerate(variables):
                self.sums[optimizer._var_key(variable)] = make(
                    (*parts, *variable.shape), variable.dtype, f"passes_{number}", True)
        elastic_snapshot.mark_owner(optimizer)

    def forget_passes(self) -> None:
        """Start the sums over passes anew."""
        for total in self.sums.values():
            total.assign(tf.zeros_like(total))
        if self.counter is not None:
            self.counter.assign(0)

    def stamp_rank(self) -> None:
        """Say in the state that it is this rank's."""
        for stamp in (self.server_stamp, self.reducer.stamp):
            if stamp is not None:
                stamp.assign([self.collectives.rank, self.collectives.size])

    def loss_scaled_by(self, optimizer: Any) -> None:
        """Tell the preconditioner whose ``scale_loss`` the loss goes through."""
        if self.preconditioner is not None:
            self.preconditioner.scaled_by(optimizer)

    def end_skipped_pass(self, skipped: Any) -> None:
        """A pass whose gradients are not finite has ended (if ``skipped``): it comes to no step."""
        self.end_pass(skipped)
        if self.scaling is not None:
            self.scaling.note_pass(skipped)

    def end_pass(self, ended: Any = True) -> None:
        """Tell the preconditioner that a pass has ended (if ``ended``), applied or not."""
        if self.preconditioner is not None:
            self.preconditioner.end_pass(ended)

    def report(self, optimizer: Any) -> dict[str, Any]:
        """Figures of the last step; "server" where the argument was given."""
        found = report(self.reducer, self.preconditioner, optimizer)
        if self.where is None:
            return found
        return {**found, "server": server_report(self.server, self.where, optimizer, self.references,
                                                 self.reducer.variables)}

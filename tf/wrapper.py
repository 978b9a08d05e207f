"""A Keras optimizer whose gradients are reduced over the ranks: the step, state, and what Keras calls.

Keras 3 hands gradients to ``optimizer.apply`` and nowhere else, whether they come from
``model.fit``, a ``train_step`` or ``apply_gradients``. They are reduced at the last moment before
they are clipped: after Keras has unscaled them, dropped missing ones and accumulated
``gradient_accumulation_steps`` of them, so that each of these works as in one process.

The way of a gradient is :class:`Step`, from top to bottom; :class:`Distributed` only connects it to
Keras' methods.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import horovod.tensorflow as horovod
import keras
import tensorflow as tf

from hvd_ext.tensorflow import carried, keras_hooks, keras_store
from hvd_ext.tensorflow.reducers.base import Reducer, before_reduce, divide_by_ranks, precondition, report
from hvd_ext.tensorflow.server import UpdateServer, state_bytes
from hvd_ext.tensorflow.uneven_data import EXTENDED
from hvd_ext.tensorflow.variables import CallableList, as_tf, made_now, make_state, mark_per_rank, name_of

# AutoGraph has nothing to translate here, and would take seconds to find out.
as_it_is = tf.autograph.experimental.do_not_convert


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

    def run(self, gradients: Sequence[Any], apply: Callable[..., None]) -> None:
        """The whole step; ``apply`` is the wrapped optimizer's."""
        gradients = self._overwrites(list(gradients))
        if self.wrapper.scaling is not None:  # hvd.uneven
            gradients = self.wrapper.scaling.before(gradients)
        if self.wrapper.options.passes > 1:
            self._gather(gradients, apply)
        else:
            self._apply(gradients, apply)
        self.wrapper.end_pass()

    def _fill_missing(self, gradients: list[Any]) -> list[Any]:
        """Zeros where a reducer needs them: Keras would leave such variables out."""
        far = self._far()
        filled = self.wrapper.reducer.fill_missing([gradients[index] for index in far],
                                                   [self.variables[index] for index in far])
        for index, gradient in zip(far, filled, strict=True):
            gradients[index] = gradient
        return gradients

    def _far(self) -> list[int]:
        """The variables whose gradients are reduced, by number."""
        return [index for index, variable in enumerate(self.variables)
                if id(as_tf(variable)) not in self.wrapper.local]

    def _overwrites(self, gradients: list[Any]) -> list[Any]:
        """Gradients that Keras writes into their variables as they are (float8 scales): the maximum."""
        collectives = self.wrapper.collectives
        for index, (gradient, variable) in enumerate(zip(gradients, self.variables, strict=True)):
            if gradient is None or not getattr(variable, "overwrite_with_gradient", False):
                continue
            name = f"{self.wrapper.options.prefix}/overwrite/{name_of(variable)}"
            maximum: Callable[[], Any] = functools.partial(
                collectives.allreduce, gradient, name, op=horovod.Max)
            gradients[index] = collectives.if_many(maximum, functools.partial(tf.identity, gradient))
        return gradients

    def _gather(self, gradients: Sequence[Any], apply: Callable[..., None]) -> None:
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
            sums.append(None if gradient is None else total)
        done = wrapper.counter.assign_add(1)

        def last_pass() -> None:
            divisor = options.passes if options.average_passes and not apart else 1
            self._apply([None if total is None else total / divisor for total in sums], apply)
            wrapper.forget_passes()

        def other_pass() -> None:
            self.optimizer._iterations.assign_add(1)

        keras.ops.cond(tf.greater_equal(done, options.passes), last_pass, other_pass)

    def _apply(self, gradients: Sequence[Any], apply: Callable[..., None]) -> None:
        """Into Keras, which comes back with the gradients to ``reduce`` and to ``update``."""
        gradients = self._fill_missing(list(gradients))
        if not self.wrapper.standard:  # one that has its own way from ``apply`` to its update
            gradients = self.reduce(gradients)
        apply(gradients, self.variables)
        if not self.reduced:
            raise RuntimeError("the wrapped optimizer updated its variables without passing the "
                               "gradients on to be reduced; please report this optimizer")

    def reduce(self, gradients: Sequence[Any]) -> list[Any]:
        """The gradients over all ranks, preconditioned; those of local variables scaled if asked."""
        keras_hooks.refuse_xla("hvd.DistributedOptimizer")
        wrapper, reducer = self.wrapper, self.wrapper.reducer
        self.reduced = True
        result = list(gradients)
        far = self._far()
        variables, mine = ([every[index] for index in far] for every in (self.variables, gradients))
        if wrapper.options.passes == 1 and not self.optimizer.gradient_accumulation_steps:
            before_reduce(wrapper.preconditioner, mine, variables)
        reduced, self.good = reducer(mine, variables, **reducer.inputs(self.optimizer))
        if wrapper.scaling is not None:
            reduced = wrapper.scaling.after(reduced)
        reduced = precondition(wrapper.preconditioner, reduced, variables, reducer, self.good)
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
        reduced = self.reduce(gradients)
        if self.good is None:
            apply(reduced, self.variables)
            return
        good, self.good = self.good, None  # decided here, for the whole of it

        def skip() -> None:
            self.optimizer._iterations.assign_sub(1)  # a step not taken is not counted

        keras.ops.cond(good, lambda: apply(reduced, self.variables), skip)

    def reduce_accumulated(self, gradients: Sequence[Any]) -> Sequence[Any]:
        """The mean over ``gradient_accumulation_steps``, reduced, in the step that updates."""
        if self.wrapper.standard and self.optimizer.gradient_accumulation_steps:
            return self.reduce(gradients)
        return gradients

    def update(self, update: Callable[..., None], gradients: Sequence[Any], variables: Sequence[Any],
               learning_rate: Any) -> None:
        """The wrapped optimizer's update of the variables, on the ranks where it belongs."""
        server = self.wrapper.server

        def run() -> None:
            if server is None:
                update(gradients, variables, learning_rate)
            else:
                server.update(lambda some, owned: update(some, owned, learning_rate), gradients,
                              variables, self.wrapper.options.prefix)

        self.if_good(run)

    def if_good(self, change: Callable[[], None]) -> None:
        """Change weights, unless this step is to be skipped."""
        if self.good is None:
            change()
        else:
            keras.ops.cond(self.good, change, lambda: None)


class Wrapper:
    """What a distributed optimizer has beyond the wrapped one, under ``optimizer._hvd_ext``."""

    def __init__(self, reducer: Reducer, *, standard: bool, scale_local: bool, preconditioner: Any,
                 server: UpdateServer | None, where: str | None, reset_per_rank_state: bool) -> None:
        self.reducer = reducer
        self.collectives = reducer.collectives
        self.options = reducer.options
        self.scale_local = scale_local
        self.preconditioner = preconditioner
        self.server = server
        self.where = where
        self.server_stamp: Any = None
        self.reset_per_rank_state = reset_per_rank_state
        self.local: set[int] = set()
        self.counter: Any = None
        self.sums: dict[str, Any] = {}
        self.standard = standard
        self.step: Step | None = None
        self.scaling: Any = None  # of gradients, by ``hvd.uneven``
        if preconditioner is not None:
            EXTENDED[self] = type(preconditioner).__name__
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

    def build(self, optimizer: Any, variables: Sequence[Any]) -> None:
        """Make the state that reduction and accumulation over passes need, in the optimizer."""
        self.plain_count = len(optimizer.variables)
        make = functools.partial(make_state, optimizer)
        self.reducer.build([one for one in variables if id(as_tf(one)) not in self.local], make)
        if self.server is not None:
            self.server_stamp = make((2,), "int64", "rank_and_ranks_of_server", True)
        self.stamp_rank()
        accumulated = getattr(optimizer, "_accumulated_gradients", ())
        for total, variable in zip(accumulated, variables, strict=False):
            self.references[id(as_tf(total))] = variable, keras_store.ACCUMULATOR
        if self.options.passes > 1:
            parts = self.reducer.parts_shape()
            self.counter = make((), "int64", "passes_done", False)
            for number, variable in enumerate(variables):
                self.sums[optimizer._var_key(variable)] = make(
                    (*parts, *variable.shape), variable.dtype, f"passes_{number}", True)
        carried.mark_owner(optimizer)

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

    def end_pass(self, ended: Any = True) -> None:
        """Tell the preconditioner that a pass has ended (if ``ended``), applied or not."""
        if self.preconditioner is not None:
            self.preconditioner.end_pass(ended)

    def report(self, optimizer: Any) -> dict[str, Any]:
        """Figures of the last step; "server" where the argument was given."""
        found = report(self.reducer, self.preconditioner)
        if self.where is None:
            return found
        held = [as_tf(variable) for variable in optimizer.variables
                if id(as_tf(variable)) in self.references]
        if self.server is not None:
            return {**found, "server": self.server.report(held)}
        elements = sum(int(tf.TensorShape(variable.shape).num_elements())
                       for variable in self.reducer.variables)
        return {**found, "server": {"where": self.where, "owned_elements": elements,
                                    "elements": elements, "largest_share": elements,
                                    **state_bytes(held)}}


class Distributed:
    """What the class of a distributed optimizer overrides in the wrapped one."""

    _hvd_ext: Wrapper

    @property
    def variables(self) -> CallableList:
        """All variables; also ``optimizer.variables()``, as Horovod's elastic states call it."""
        return CallableList(keras_store.in_place(self, super().variables))

    # The step, in the order in which Keras calls

    @as_it_is
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        if len(grads) == 0:
            return
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                with made_now(), keras.name_scope(self.name, caller=self):
                    self.build(trainable_variables)
                self.built = True
        variables = self._trainable_variables if trainable_variables is None else trainable_variables
        if len(grads) != len(variables):
            raise ValueError(f"got {len(grads)} gradients for {len(variables)} variables; pass one "
                             "gradient, or None, for each variable")
        with self._hvd_ext.new_step(self, variables) as step:
            step.run(grads, super().apply)

    def _backend_apply_gradients(self, grads: Sequence[Any],
                                 trainable_variables: Sequence[Any]) -> None:
        step = self._hvd_ext.step
        step.variables = list(trainable_variables)  # Keras leaves out those without a gradient
        step.reduce_and_apply(grads, super()._backend_apply_gradients)

    def _clip_gradients(self, grads: Sequence[Any]) -> Any:
        return super()._clip_gradients(self._hvd_ext.step.reduce_accumulated(grads))

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        self._hvd_ext.step.if_good(functools.partial(super()._apply_weight_decay, variables))

    def _backend_update_step(self, grads: Sequence[Any], trainable_variables: Sequence[Any],
                             learning_rate: Any) -> None:
        self._hvd_ext.step.update(super()._backend_update_step, grads, trainable_variables,
                                  learning_rate)

    def scale_loss(self, loss: Any) -> Any:
        """The loss times ``loss_scale_factor``."""
        self._hvd_ext.loss_scaled_by(self)
        return super().scale_loss(loss)

    # State

    def build(self, variables: Sequence[Any]) -> None:
        if self.built or not variables:  # Keras gives none when it reads an .h5 file
            return
        server = self._hvd_ext.server
        if server is not None:
            server.build(list(variables), self._hvd_ext.local)
        super().build(variables)
        if server is not None and self.use_ema:
            averages = self._model_variables_moving_average
            for index in [k for k, variable in enumerate(variables) if not server.has_room(variable)]:
                averages[index] = None  # Keras leaves these out
        self._hvd_ext.build(self, list(variables))
        keras_store.set_waiting_weights(self)

    def add_variable_from_reference(self, reference_variable: Any, name: str | None = None,
                                    initializer: Any = "zeros") -> Any:
        """A variable of the optimizer; an empty one for what another rank keeps."""
        server = self._hvd_ext.server
        accumulator = name == keras_store.ACCUMULATOR
        if server is None or accumulator or server.has_room(reference_variable):
            made = super().add_variable_from_reference(reference_variable, name=name,
                                                       initializer=initializer)
        else:
            made = self.add_variable(shape=(0,), dtype=reference_variable.dtype,  # .h5: names are unique
                                     name=f"{name_of(reference_variable).replace('/', '_')}_{name}_elsewhere")
        self._hvd_ext.references[id(as_tf(made))] = reference_variable, name
        return mark_per_rank(made) if accumulator or server is not None else made

    def _overwrite_model_variables_with_average_value(self, trainable_variables: Any) -> None:
        server = self._hvd_ext.server
        if server is None:
            super()._overwrite_model_variables_with_average_value(trainable_variables)
            return
        for variable, average in zip(trainable_variables, self._model_variables_moving_average,
                                     strict=True):
            if average is not None:
                as_tf(variable).assign(average)
        server.send(trainable_variables, f"{self._hvd_ext.options.prefix}/averages")

    def load_own_variables(self, store: Any) -> None:
        keras_store.load(self, store, super().load_own_variables)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Take back the values of ``variables``, as files in the .h5 format hold them."""
        keras_store.set_weights(self, weights, super().set_weights)

    def save_own_variables(self, store: Any) -> None:
        keras_store.save(self, store, super().save_own_variables)

    def report(self) -> dict[str, Any]:
        """Figures of the last step: bytes by kind, and those of each extension in use."""
        return self._hvd_ext.report(self)

    def reset_per_rank_state(self) -> None:
        """Start anew what belongs to this rank: residuals, MeanSquare, gradients accumulated."""
        self._hvd_ext.reducer.reset_per_rank_state()
        for total in self._hvd_ext.sums.values():
            total.assign(tf.zeros_like(total))

    def register_local_var(self, variable: Any) -> None:
        """Keep a variable's gradient on this rank: it is not reduced."""
        if self.built:
            raise ValueError(f"register_local_var({name_of(variable)}) after the optimizer was "
                             "built; call it before the first step")
        self._hvd_ext.local.add(id(as_tf(variable)))

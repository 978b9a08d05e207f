"""``DistributedOptimizer`` for Keras 3: the wrapped optimizer itself, with reduced gradients.

Keras 3 hands gradients to ``optimizer.apply`` and nowhere else, whether they come from
``model.fit``, a ``train_step`` or ``apply_gradients``. They are reduced there at the last moment
before they are clipped: after Keras has unscaled them, dropped missing ones and accumulated
``gradient_accumulation_steps`` of them, so that each of these works as in one process.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as horovod
import keras
import tensorflow as tf

from hvd_ext import checks
from hvd_ext.options import Options
from hvd_ext.tensorflow import checkpoint, keras_hooks
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.distribution import Distribution, check_extension
from hvd_ext.tensorflow.reducers import check_preconditioner, make_reducer
from hvd_ext.tensorflow.reducers.plain import PlainReducer
from hvd_ext.tensorflow.server import make_server
from hvd_ext.tensorflow.variables import as_tf, mark_per_rank, name_of

# AutoGraph has nothing to translate here, and would take seconds to find out.
as_it_is = tf.autograph.experimental.do_not_convert


class _Distributed:
    """What the class of a distributed optimizer overrides in the wrapped one."""

    _hvd_ext: Distribution

    @property
    def variables(self) -> _CallableList:
        """All variables; also ``optimizer.variables()``, as Horovod's elastic states call it."""
        return _CallableList(super().variables)

    def build(self, variables: Sequence[Any]) -> None:
        if self.built:
            return
        server = self._hvd_ext.server
        if server is not None:
            server.build(list(variables), self._hvd_ext.local)
        super().build(variables)
        if server is not None and self.use_ema:
            averages = self._model_variables_moving_average
            for index, variable in enumerate(variables):
                if not server.owns(variable):
                    averages[index] = None  # Keras leaves these out
        self._hvd_ext.build(self, list(variables))

    def add_variable_from_reference(self, reference_variable: Any, name: str | None = None,
                                    initializer: Any = "zeros") -> Any:
        """A variable of the optimizer; an empty one for what another rank keeps."""
        server = self._hvd_ext.server
        accumulator = name == checkpoint.ACCUMULATOR
        if server is None or accumulator or server.owns(reference_variable):
            made = super().add_variable_from_reference(reference_variable, name=name,
                                                       initializer=initializer)
        else:
            made = self.add_variable(shape=(0,), dtype=reference_variable.dtype,
                                     name=f"{name}_elsewhere")
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
        server.send(trainable_variables, f"{self._hvd_ext.prefix}/averages")

    def scale_loss(self, loss: Any) -> Any:
        """The loss times ``loss_scale_factor``."""
        self._hvd_ext.loss_scaled_by(self)
        return super().scale_loss(loss)

    def _backend_update_step(self, grads: Sequence[Any], trainable_variables: Sequence[Any],
                             learning_rate: Any) -> None:
        update = super()._backend_update_step
        server = self._hvd_ext.server

        def run() -> None:
            if server is None:
                update(grads, trainable_variables, learning_rate)
            else:
                server.update(lambda some, owned: update(some, owned, learning_rate), grads,
                              trainable_variables, self._hvd_ext.prefix)

        self._hvd_ext.if_good(run)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        decay = super()._apply_weight_decay
        self._hvd_ext.if_good(lambda: decay(variables))

    @as_it_is
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        if len(grads) == 0:
            return
        distribution = self._hvd_ext
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                with tf.init_scope(), keras.name_scope(self.name, caller=self):
                    self.build(trainable_variables)
                self.built = True
        variables = self._trainable_variables if trainable_variables is None else trainable_variables
        if len(grads) != len(variables):
            raise ValueError(f"got {len(grads)} gradients for {len(variables)} variables; pass one "
                             "gradient, or None, for each variable")
        grads = _reduce_overwrites(self, list(grads), variables)
        if distribution.passes > 1:
            self._apply_after_passes(grads, variables)
        else:
            self._reduce_and_apply(grads, variables)
        distribution.pass_over()

    def _reduce_and_apply(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        distribution = self._hvd_ext
        with distribution.application():
            if not distribution.standard:
                grads, _ = distribution.reduce(self, grads, variables)
            super().apply(grads, variables)

    def _backend_apply_gradients(self, grads: Sequence[Any],
                                 trainable_variables: Sequence[Any]) -> None:
        distribution = self._hvd_ext
        apply = super()._backend_apply_gradients
        if not distribution.standard:
            apply(grads, trainable_variables)
        elif self.gradient_accumulation_steps:
            distribution.applying = list(trainable_variables)
            try:
                apply(grads, trainable_variables)
            finally:
                distribution.applying = None
        else:
            reduced, good = distribution.reduce(self, grads, trainable_variables)
            if good is None:
                apply(reduced, trainable_variables)
            else:
                def take() -> None:
                    apply(reduced, trainable_variables)

                def skip() -> None:
                    self._iterations.assign_sub(1)  # a step not taken is not counted

                keras.ops.cond(good, take, skip)

    def _clip_gradients(self, grads: Sequence[Any]) -> Any:
        distribution = self._hvd_ext
        distribution.good = None
        if distribution.applying is not None:  # the mean over gradient_accumulation_steps
            grads, distribution.good = distribution.reduce(self, grads, distribution.applying)
        return super()._clip_gradients(grads)

    def _apply_after_passes(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        """Horovod's backward_passes_per_step: sum here, reduce and apply on the last pass."""
        distribution = self._hvd_ext
        apart = bool(distribution.reducer.parts_shape())  # each pass is a worker of its own
        sums: list[Any] = []
        for gradient, variable in zip(grads, variables, strict=True):
            total = distribution.sums[self._var_key(variable)]
            if isinstance(gradient, tf.IndexedSlices):
                if not distribution.sparse_as_dense:
                    raise ValueError(
                        f"the gradient of {name_of(variable)} is a tf.IndexedSlices, which cannot "
                        "be summed over backward_passes_per_step; pass sparse_as_dense=True")
                gradient = tf.convert_to_tensor(gradient)
            if gradient is not None and apart:
                now = tf.equal(tf.range(distribution.passes, dtype=tf.int64), distribution.counter)
                now = tf.reshape(now, (-1, *[1] * len(gradient.shape)))
                total.assign(tf.where(now, tf.cast(gradient, total.dtype)[None], total))
            elif gradient is not None:
                total.assign_add(tf.cast(gradient, total.dtype))
            sums.append(None if gradient is None else total)
        done = distribution.counter.assign_add(1)

        def last_pass() -> None:
            divisor = distribution.passes if distribution.average_passes and not apart else 1
            self._reduce_and_apply(
                [None if total is None else total / divisor for total in sums], variables)
            for total in distribution.sums.values():
                total.assign(tf.zeros_like(total))
            distribution.counter.assign(0)

        def other_pass() -> None:
            self._iterations.assign_add(1)

        keras.ops.cond(tf.greater_equal(done, distribution.passes), last_pass, other_pass)

    def load_own_variables(self, store: Any) -> None:
        checkpoint.load(self, store, super().load_own_variables)

    def save_own_variables(self, store: Any) -> None:
        gathered = self._hvd_ext.gathered
        if gathered is None:
            super().save_own_variables(store)
            return
        for number, value in gathered.items():
            store[number] = value

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


class _CallableList(list):
    def __call__(self) -> _CallableList:
        return self


def distribute(optimizer: Any, name: str | None = None, device_dense: str = "",
               device_sparse: str = "", compression: Any = horovod.Compression.none,
               sparse_as_dense: bool = False, gradient_predivide_factor: float = 1.0,
               op: Any = horovod.Average, backward_passes_per_step: int = 1,
               average_aggregated_gradients: bool = False, num_groups: int = 0, groups: Any = None,
               process_set: Any = horovod.global_process_set, scale_local_gradients: bool = True,
               *, preconditioner: Any = None, server: str | None = None,
               reset_per_rank_state: bool = False) -> Any:
    """Make a Keras optimizer reduce gradients over all ranks before it applies them.

    The optimizer given is changed in place and returned: its class (by ``isinstance`` and by
    name), its state if it has any, its schedules, clipping, weight decay and averages stay.

    Args:
        optimizer: a ``keras.optimizers.Optimizer``, also a ``LossScaleOptimizer``.
        name: prefix of the operations' names in Horovod's timeline; by default the optimizer's.
        op: ``Average``, ``Sum`` or ``DelayCompensated(...)``.
        compression: ``Compression.none``, ``Compression.fp16`` or ``Compression.topk(...)``.
        preconditioner: ``SENG(model, ...)``: what the reduced gradient is turned into.
        server: where the update runs: "replicated" (as without it), "rank0", or "sharded", each
            variable's on its owner; a rank keeps the optimizer's state of what it owns.
        reset_per_rank_state: when the optimizer's variables are loaded from a file, start anew
            the state that belongs to one rank (TopK's residuals, MeanSquare).

    The other arguments are those of ``horovod.tensorflow.keras.DistributedOptimizer``.

    Raises:
        RuntimeError: Keras runs on another backend than TensorFlow.
        TypeError: ``optimizer`` is no Keras optimizer.
        ValueError: it is distributed already, or arguments contradict each other.
        NotImplementedError: an extension that the TensorFlow front end does not have.
    """
    keras_hooks.require_tensorflow_backend("hvd.DistributedOptimizer")
    if not isinstance(optimizer, keras.Optimizer):
        raise TypeError(f"optimizer must be a keras.optimizers.Optimizer, got {optimizer!r}")
    if keras_hooks.distribution_of(optimizer) is not None:
        raise ValueError(
            f"the optimizer {optimizer.name!r} is distributed already: its gradients would be "
            "reduced twice; call hvd.DistributedOptimizer once (hvd.load_model does it too)")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # The inner one meets gradients unscaled; whether they are finite is agreed on before.
        distribute(
            optimizer.inner_optimizer, name, device_dense, device_sparse, compression,
            sparse_as_dense, gradient_predivide_factor, op, backward_passes_per_step,
            average_aggregated_gradients, num_groups, groups, process_set, scale_local_gradients,
            preconditioner=preconditioner, server=server,
            reset_per_rank_state=reset_per_rank_state)
        object.__setattr__(optimizer, "report", optimizer.inner_optimizer.report)
        return optimizer
    passes = checks.whole("backward_passes_per_step", backward_passes_per_step, low=1)
    if passes > 1 and optimizer.gradient_accumulation_steps:
        raise ValueError(
            f"backward_passes_per_step={passes} and the optimizer's gradient_accumulation_steps="
            f"{optimizer.gradient_accumulation_steps} both accumulate gradients; give one of them")
    if num_groups:
        warnings.warn("num_groups has been replaced by groups", DeprecationWarning, stacklevel=3)
        groups = num_groups if groups is None else groups
    check_preconditioner(preconditioner)
    collectives = Collectives(process_set, device_dense=device_dense, device_sparse=device_sparse)
    placed = make_server(server, optimizer, collectives)
    if placed is not None:
        check_extension(optimizer, f"server={server!r}")
    reducer = make_reducer(
        collectives, Options(
            prefix=name or optimizer.name, passes=passes, groups=groups,
            average_passes=average_aggregated_gradients, sparse_as_dense=sparse_as_dense,
            half=compression is horovod.Compression.fp16),
        op=op, compression=compression, predivide=gradient_predivide_factor)
    if not isinstance(reducer, PlainReducer):
        check_extension(optimizer, type(reducer).__name__.removesuffix("Reducer"))
    if preconditioner is not None:
        check_extension(optimizer, "SENG")
    keras_hooks.install()
    distribution = Distribution(
        optimizer, reducer, passes=passes, average_passes=average_aggregated_gradients,
        scale_local=scale_local_gradients, sparse_as_dense=sparse_as_dense,
        preconditioner=preconditioner, server=placed, where=server,
        reset_per_rank_state=reset_per_rank_state)
    object.__setattr__(optimizer, keras_hooks.ATTRIBUTE, distribution)
    object.__setattr__(optimizer, "__class__", distributed_class(type(optimizer)))
    if optimizer.built:
        distribution.build(optimizer, list(optimizer._trainable_variables))
    return optimizer


@functools.cache
def distributed_class(wrapped: type) -> type:
    """A subclass of ``wrapped`` under its name, so that saved models load without this package."""
    kind = type(wrapped.__name__, (_Distributed, wrapped), {
        "__module__": wrapped.__module__, "__qualname__": wrapped.__qualname__,
        "__doc__": wrapped.__doc__})
    registered = keras.saving.get_registered_name(wrapped)
    if registered != wrapped.__name__:
        keras.src.saving.object_registration.GLOBAL_CUSTOM_NAMES[kind] = registered
    return kind


def _reduce_overwrites(optimizer: Any, grads: list[Any], variables: Sequence[Any]) -> list[Any]:
    """Gradients that Keras writes into their variables as they are (float8 scales): the maximum."""
    collectives: Collectives = optimizer._hvd_ext.collectives
    for index, (gradient, variable) in enumerate(zip(grads, variables, strict=True)):
        if gradient is None or not getattr(variable, "overwrite_with_gradient", False):
            continue
        name = f"{optimizer._hvd_ext.prefix}/overwrite/{name_of(variable)}"
        maximum: Callable[[], Any] = functools.partial(
            collectives.allreduce, gradient, name, op=horovod.Max)
        grads[index] = collectives.if_many(maximum, functools.partial(tf.identity, gradient))
    return grads

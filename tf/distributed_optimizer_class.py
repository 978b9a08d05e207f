"""What the class of a distributed optimizer has beyond the wrapped one: Keras' methods, and ours."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from hvd_ext.tensorflow.persistence import keras_checkpoint_layout, pickling
from hvd_ext.tensorflow.sharding.clipping import clip_by_global_norm
from hvd_ext.tensorflow.sharding.downlink import exact_weights
from hvd_ext.tensorflow.step import Wrapper
from hvd_ext.tensorflow.variables import CallableList, as_tf, create_without_lifting, mark_per_rank, name_of

# AutoGraph has nothing to translate here, and would take seconds to find out.
no_autograph = tf.autograph.experimental.do_not_convert


class Distributed:
    """What the class of a distributed optimizer overrides in the wrapped one."""

    _hvd_ext: Wrapper

    @property
    def variables(self) -> CallableList:
        """All variables; also ``optimizer.variables()``, as Horovod's elastic states call it."""
        return CallableList(keras_checkpoint_layout.in_place(self, super().variables))

    # The step, in the order in which Keras calls

    @no_autograph
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        if len(grads) == 0:
            return
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                with create_without_lifting(), keras.name_scope(self.name, caller=self):
                    self.build(trainable_variables)
                self.built = True
        variables = self._trainable_variables if trainable_variables is None else trainable_variables
        if len(grads) != len(variables):
            raise ValueError(f"got {len(grads)} gradients for {len(variables)} variables; pass one "
                             "gradient, or None, for each variable")
        with self._hvd_ext.new_step(self, variables) as step:
            step.run_step(grads, super().apply)

    def _backend_apply_gradients(self, grads: Sequence[Any],
                                 trainable_variables: Sequence[Any]) -> None:
        step = self._hvd_ext.step
        step.variables = list(trainable_variables)  # Keras leaves out those without a gradient
        step.reduce_and_apply(grads, super()._backend_apply_gradients)

    def _clip_gradients(self, grads: Sequence[Any]) -> Any:
        step = self._hvd_ext.step
        reduced = step.reduce_accumulated(grads)
        if self._hvd_ext.reducer.owner_only and self.global_clipnorm and not self.clipnorm:
            return clip_by_global_norm(reduced, step.variables, self.global_clipnorm, self._hvd_ext.reducer)
        return super()._clip_gradients(reduced)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        step, decay = self._hvd_ext.step, super()._apply_weight_decay
        if getattr(self._hvd_ext.server, "replies", None) is not None:  # the owners' part
            step.decay = decay
        else:
            step.if_good(functools.partial(decay, variables))

    def _backend_update_step(self, grads: Sequence[Any], trainable_variables: Sequence[Any],
                             learning_rate: Any) -> None:
        self._hvd_ext.step.apply_update(super()._backend_update_step, grads, trainable_variables,
                                        learning_rate)

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        """Keras' sum over the replicas of a strategy; one replica needs none, and no custom gradient for it.

        TensorFlow's registry of gradients would keep the traced graph for good.
        """
        if tf.distribute.get_strategy().num_replicas_in_sync == 1:
            return list(grads_and_vars)
        return super()._all_reduce_sum_gradients(grads_and_vars)

    def _var_key(self, variable: Any) -> Any:
        server = self._hvd_ext.server
        return super()._var_key(variable if server is None else server.stand_ins.variable_of(variable))

    def scale_loss(self, loss: Any) -> Any:
        """The loss times ``loss_scale_factor``."""
        self._hvd_ext.loss_scaled_by(self)
        return super().scale_loss(loss)

    # State

    def get_config(self) -> dict[str, Any]:
        """The wrapped optimizer's configuration; :meth:`from_config` distributes what it gives."""
        return pickling.config_of(self, super().get_config())

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """A distributed optimizer with the settings of the one whose ``get_config()`` this is."""
        kind = cls.__bases__[1]
        return pickling.from_config(kind, config, functools.partial(kind.from_config, **(
            {} if custom_objects is None else {"custom_objects": custom_objects})))

    def __reduce__(self) -> Any:
        return pickling.reduce_optimizer(self)

    def build(self, variables: Sequence[Any]) -> None:
        if self.built or not variables:  # Keras gives none when it reads an .h5 file
            return
        with create_without_lifting():  # LossScaleOptimizer builds it while a step is traced
            self._build(variables)

    def _build(self, variables: Sequence[Any]) -> None:
        server = self._hvd_ext.server
        if server is not None:
            server.plan_owners(list(variables), self._hvd_ext.local)
        super().build(variables)
        if server is not None and self.use_ema:
            averages = self._model_variables_moving_average
            for index in [k for k, variable in enumerate(variables) if not server.has_room(variable)]:
                averages[index] = None  # Keras leaves these out
        self._hvd_ext.create_state(self, list(variables))
        keras_checkpoint_layout.set_waiting_weights(self)

    def add_variable_from_reference(self, reference_variable: Any, name: str | None = None,
                                    initializer: Any = "zeros") -> Any:
        """A variable of the optimizer; an empty one for what another rank keeps."""
        server = self._hvd_ext.server
        accumulator = name == keras_checkpoint_layout.ACCUMULATOR
        if server is None or accumulator or server.has_room(reference_variable):
            stand_in = (None if server is None or accumulator
                    else server.stand_ins.proxy_of(reference_variable))
            made = super().add_variable_from_reference(
                reference_variable if stand_in is None else stand_in, name=name, initializer=initializer)
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
        server.send_weights(trainable_variables, f"{self._hvd_ext.reducer.prefix}/averages")

    def load_own_variables(self, store: Any) -> None:
        keras_checkpoint_layout.load_variables(self, store, super().load_own_variables)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Take back the values of ``variables``, as files in the .h5 format hold them."""
        keras_checkpoint_layout.set_weights(self, weights, super().set_weights)

    def save_own_variables(self, store: Any) -> None:
        keras_checkpoint_layout.save_variables(self, store, super().save_own_variables)

    def report(self) -> dict[str, Any]:
        """Figures of the last step: bytes by kind, and those of each extension in use."""
        return self._hvd_ext.report(self)

    exact_weights = exact_weights

    def reset_per_rank_state(self) -> None:
        """Start anew what belongs to this rank: residuals, MeanSquare, gradients accumulated."""
        self._hvd_ext.reducer.reset_per_rank_state()
        self._hvd_ext.forget_passes()
        for total in self._accumulated_gradients if self.gradient_accumulation_steps else ():
            total.assign(tf.zeros_like(as_tf(total)))

    def flush(self) -> None:
        """Take the update that is still to come with ``overlap=``; without, nothing. On all ranks alike.

        Call it after the last step, and before an evaluation that must include all of them.

        Raises:
            RuntimeError: in the midst of ``backward_passes_per_step``.
        """
        wrapper = self._hvd_ext
        if not wrapper.reducer.staleness or not self.built:
            return
        if wrapper.counter is not None and int(wrapper.counter):
            raise RuntimeError(f"flush() after {int(wrapper.counter)} of backward_passes_per_step="
                               f"{wrapper.options.passes} passes; call it after a whole step")
        given = [variable for number, variable in enumerate(wrapper.reducer.variables)
                 if number not in wrapper.reducer.left_out]  # what is frozen now stays as it is
        with wrapper.new_step(self, given) as step:
            step.flush(super().apply)

    def register_local_var(self, variable: Any) -> None:
        """Keep a variable's gradient on this rank: it is not reduced."""
        if self._hvd_ext.reducer.staleness:
            raise ValueError(f"register_local_var({name_of(variable)}) with overlap=: a local gradient is "
                             "not "
                             "late, and would be lost in the first step; drop one of them")
        if self.built:
            raise ValueError(f"register_local_var({name_of(variable)}) after the optimizer was "
                             "built; call it before the first step")
        self._hvd_ext.local.add(id(as_tf(variable)))

"""``DistributedGradientTape``: a tape whose gradients are reduced over all ranks.

Horovod's own cannot take Keras 3 variables; this one takes them and tf.Variables.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import horovod.tensorflow as horovod
import keras
import tensorflow as tf

from hvd_ext.consistency.handshake import checks_weights
from hvd_ext.horovod_api.signatures import copy_signature
from hvd_ext.reducers.buckets import check_groups
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.reducers.registry import method_of, public_name
from hvd_ext.tensorflow import keras_hooks
from hvd_ext.tensorflow.collectives import Collectives, divide_by_ranks
from hvd_ext.tensorflow.keras_hooks import refuse_xla
from hvd_ext.tensorflow.loss_scale import loss_scale
from hvd_ext.tensorflow.optimizer import local_variables
from hvd_ext.tensorflow.reducers import (
    OTHER_REDUCTIONS,
    REDUCERS,
    REDUCTIONS,
    check_preconditioner,
    make_reducer,
)
from hvd_ext.tensorflow.reducers.base import (
    Reducer,
    before_reduce,
    precondition_gradients,
    report,
)
from hvd_ext.tensorflow.reducers.plain import keep_gradient
from hvd_ext.tensorflow.transaction import ASKED, Transaction, ask_once
from hvd_ext.tensorflow.variables import as_tf, create_outside_graph, make_state

KEPT = "_hvd_ext_tape"
AGAIN = "_hvd_ext_traced_again"
MOST_KEPT = 4  # settings per model; who changes them each step has a new reducer each step


class _DistributedGradientTape(tf.GradientTape):
    """A ``tf.GradientTape`` with ``gradient`` reduced."""

    def __init__(self, tape: tf.GradientTape, settings: TapeSettings, scale_local_gradients: bool,
                 optimizer: Any, preconditioner: Any) -> None:
        super().__init__()
        tape.__dict__.setdefault(ASKED, set())  # shared by all that are made of this tape
        self.__dict__.update(tape.__dict__)
        self._settings = settings
        self._scale_local = scale_local_gradients
        self._optimizer = optimizer
        self._preconditioner = preconditioner
        self._local_sources: set[int] = set()

    def register_local_source(self, source: Any) -> None:
        """Keep a variable's gradient on this rank: it is not reduced."""
        self._local_sources.add(id(as_tf(source)))

    @tf.autograph.experimental.do_not_convert  # nothing to translate; finding out takes seconds
    def gradient(self, target: Any, sources: Any, output_gradients: Any = None,
                 unconnected_gradients: Any = tf.UnconnectedGradients.NONE,
                 use_generic_names: bool = False) -> Any:
        """The gradient of ``target`` over all ranks, with the structure of ``sources``."""
        del use_generic_names  # names never depend on the graph here
        refuse_xla("hvd.DistributedGradientTape")
        flat_sources = keras.tree.flatten(sources)
        far = [index for index, source in enumerate(flat_sources)
               if id(as_tf(source)) not in self._local_sources]
        variables = [flat_sources[index] for index in far]
        reducer = kept_reducer(self._optimizer or (variables or flat_sources)[0], self._settings)
        self.build(flat_sources)
        transaction = self._make_transaction(reducer)
        flat = super().gradient(target, flat_sources, output_gradients, unconnected_gradients)
        if transaction is not None:
            transaction.begin_reduction(self._count_updates(), self._scale())
        before_reduce(self._preconditioner, [flat[index] for index in far], variables)
        reduced, good = self._reduce_gradients(reducer, [flat[index] for index in far], variables)
        if good is not None:  # as after a plain allreduce, what is not finite reaches every rank
            reduced = [None if gradient is None else tf.where(good, gradient, math.nan)
                       for gradient in reduced]
        reduced = precondition_gradients(self._preconditioner, reduced, variables, reducer, good)
        if transaction is not None:
            transaction.end_reduction(self._count_updates(), self._scale())
        result = list(flat)
        for index, gradient in zip(far, reduced, strict=True):
            result[index] = gradient
        if self._scale_local:
            for index in set(range(len(result))) - set(far):
                result[index] = divide_by_ranks(result[index], reducer.collectives)
        return keras.tree.pack_sequence_as(sources, result)

    def build(self, sources: Sequence[Any]) -> None:
        """Make what is kept between steps, in the optimizer given, where it is not there yet.

        The first ``gradient`` does; call it before a checkpoint is restored into new objects.
        """
        if not self._settings.keeps_state:
            return
        reducer = kept_reducer(self._optimizer, self._settings)
        if reducer.variables:
            return

        def make() -> None:
            if not self._optimizer.built:
                self._optimizer.build(list(sources))
            make_variable = functools.partial(make_state, self._optimizer)
            reducer.transaction = Transaction()
            reducer.create_state([source for source in sources
                                  if id(as_tf(source)) not in self._local_sources],
                                 reducer.transaction.record_variables(make_variable))
            reducer.transaction.create_variables(make_variable, getattr(reducer, "steps", None))

        scaled = isinstance(self._optimizer, keras.optimizers.LossScaleOptimizer)
        unbuilt = not self._optimizer.built
        create_outside_graph(make)
        if scaled and unbuilt and not tf.executing_eagerly():
            trace_again(self._optimizer)

    def _make_transaction(self, reducer: Reducer) -> Transaction | None:
        """What takes back the state of gradients that are not applied; None where nothing is kept."""
        kept = self._preconditioner
        if self._optimizer is None or not (self._settings.keeps_state or kept is not None):
            return None
        key = (id(self._optimizer), id(reducer), id(kept))
        what = [public_name(reducer.settings)] if self._settings.keeps_state else []
        ask_once(self, key, " and ".join([*what, *([] if kept is None else [type(kept).__name__])]))
        if reducer.transaction is None:
            reducer.transaction = Transaction()
        found = reducer.transaction
        if hasattr(kept, "join_transaction") and not found.has_variable(kept.steps):
            updates = as_tf(self._optimizer.iterations)
            create_outside_graph(lambda: kept.join_transaction(found, updates))
        return found

    def _count_updates(self) -> tf.Tensor:
        return tf.cast(as_tf(self._optimizer.iterations).read_value(), tf.int64)

    def _scale(self) -> tf.Tensor:
        return tf.convert_to_tensor(loss_scale(self._optimizer), tf.float32)

    def _reduce_gradients(self, reducer: Reducer, gradients: list[Any], variables: list[Any]
                          ) -> tuple[list[Any], Any]:
        if not self._settings.keeps_state:
            return self._reduce_plainly(reducer, gradients, variables), None
        # What is not linear in the gradient must see it without the loss's scale.
        scale = self._scale()
        reduced, good = reducer([_multiply(gradient, 1.0 / scale) for gradient in gradients], variables,
                                **reducer.step_inputs(self._optimizer))
        return [_multiply(gradient, scale) for gradient in reduced], good

    def _reduce_plainly(self, reducer: Reducer, gradients: list[Any], variables: list[Any]) -> list[Any]:
        """Reduced gradients; what no rank has is None, in a graph zeros, as it is known too late there."""
        missing = [index for index, gradient in enumerate(gradients) if gradient is None]
        if not reducer.presence.in_use:
            return reducer(gradients, variables)[0]
        reducer.presence.missing = {id(as_tf(variables[index])) for index in missing}
        filled = reducer.fill_missing(gradients, variables)
        if checks_weights():
            with tf.control_dependencies([reducer.check_given_weights(variables)]):
                filled = [keep_gradient(gradient) for gradient in filled]
        reduced, _ = reducer(filled, variables)
        if tf.executing_eagerly():
            for index in missing:
                if not bool(reducer.presence.is_somewhere(variables[index])):
                    reduced[index] = None
        return reduced

    @tf.autograph.experimental.do_not_convert
    def get_local_and_global_gradients(
        self, target: Any, sources: Sequence[Any], output_gradients: Any = None,
        use_generic_names: bool = False,
    ) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
        """(source, gradient) pairs of the local sources, and of the reduced ones."""
        gradients = self.gradient(target, sources, output_gradients,
                                  use_generic_names=use_generic_names)
        pairs = list(zip(sources, gradients, strict=True))
        kept = [pair for pair in pairs if id(as_tf(pair[0])) in self._local_sources]
        return kept, [pair for pair in pairs if id(as_tf(pair[0])) not in self._local_sources]


def _no_autograph(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which AutoGraph leaves alone, with its signature and defaults."""
    return copy_signature(function, tf.autograph.experimental.do_not_convert)(function)


@_no_autograph
def distributed_tape(gradtape: tf.GradientTape, device_dense: str = "", device_sparse: str = "",
                     compression: Any = horovod.Compression.none, sparse_as_dense: bool = False,
                     op: Any = horovod.Average, gradient_predivide_factor: float = 1.0,
                     num_groups: int = 0, groups: Any = None,
                     process_set: Any = horovod.global_process_set,
                     scale_local_gradients: bool = True, *, preconditioner: Any = None,
                     optimizer: Any = None) -> Any:
    """Wrap a tape so that it reduces gradients over all ranks; the arguments are Horovod's.

    Sources may be Keras 3 variables or tf.Variables; the ranks' tapes need the same ones. With
    ``op=DelayCompensated(...)`` or ``compression=Compression.topk(...)`` give ``optimizer=``, the
    Keras optimizer that will apply the gradients: its learning rate is used, and its variables
    hold what is kept between steps. Pass the same settings each step. Where it is given, with any
    ``op``, ``optimizer.report()`` has the figures of the last step.
    With ``preconditioner=`` give it where its ``scale_loss`` multiplies the loss (mixed_float16,
    ``loss_scale_factor``).

    Args:
        gradtape: the tape to wrap.
        device_dense: Horovod's: the device for dense gradients.
        device_sparse: Horovod's: the device for ``tf.IndexedSlices``.
        compression: ``hvd.Compression.none``, ``fp16``, ``topk(...)`` or ``powersgd(...)``.
        sparse_as_dense: reduce ``tf.IndexedSlices`` as dense gradients.
        op: ``hvd.Average``, ``hvd.Sum`` or ``hvd.DelayCompensated(...)``.
        gradient_predivide_factor: Horovod's: divide by it before the sum, multiply after it.
        num_groups: Horovod's: the number of groups of gradients that are reduced together.
        groups: the number of groups, or a list of the variables of each.
        process_set: the ranks that train together.
        scale_local_gradients: divide gradients of local sources by the number of ranks.
        preconditioner: ``hvd.SENG(...)`` or None.
        optimizer: the Keras optimizer that will apply the gradients; needed with an extension.

    Raises:
        TypeError: ``gradtape`` is no ``tf.GradientTape``.
        ValueError: it is distributed already, or arguments contradict each other.
        NotImplementedError: an extension that the TensorFlow front end does not have.
    """
    if not isinstance(gradtape, tf.GradientTape):
        raise TypeError(f"gradtape must be a tf.GradientTape, got {gradtape!r}")
    if isinstance(gradtape, _DistributedGradientTape):
        raise ValueError("the tape is distributed already: its gradients would be reduced twice; "
                         "call hvd.DistributedGradientTape once")
    check_preconditioner(preconditioner)
    method = method_of(REDUCERS, op, compression)
    if (method or preconditioner) is not None and Collectives(process_set).is_elastic:
        what = "SENG" if method is None else public_name(method)
        raise NotImplementedError(
            f"a tape with {what} cannot be carried by an elastic state, which finds extensions with their "
            "optimizer: use tf.GradientTape, and give the extension to hvd.DistributedOptimizer")
    if preconditioner is not None:
        preconditioner.scaled_by(optimizer, still=True)
    groups = (num_groups or None) if groups is None else groups
    settings = TapeSettings(op, compression, sparse_as_dense, gradient_predivide_factor, process_set,
                        device_dense, device_sparse,
                        _Groups(groups) if isinstance(groups, list) else groups, method is not None)
    check_groups(groups, member=(tf.Variable, keras.Variable), what="tf.Variable",
                 key=lambda variable: id(as_tf(variable)))
    _check_settings(replace(settings, groups=None))
    if optimizer is None and method is None:
        return _DistributedGradientTape(gradtape, settings, scale_local_gradients, None,
                                        preconditioner)
    if not isinstance(optimizer, keras.Optimizer):
        why = f"a tape with {public_name(method)} keeps state between steps and needs" \
            if method is not None else "a tape takes as"
        raise ValueError(
            f"{why} optimizer=, the Keras optimizer that applies its gradients; got {optimizer!r}. "
            "Pass it, or wrap the optimizer with hvd.DistributedOptimizer instead of the tape")
    if keras_hooks.wrapper_of(optimizer) is not None:
        raise ValueError("optimizer= is distributed already: gradients would be reduced twice; "
                         "use hvd.DistributedOptimizer or hvd.DistributedGradientTape, not both")
    object.__setattr__(optimizer, "report", functools.partial(
        report, kept_reducer(optimizer, settings), preconditioner, weakref.proxy(optimizer)))
    return _DistributedGradientTape(gradtape, settings, scale_local_gradients, optimizer,
                                    preconditioner)


@_no_autograph
def partial_distributed_tape(gradtape: tf.GradientTape, device_dense: str = "", device_sparse: str = "",
                             compression: Any = horovod.Compression.none, sparse_as_dense: bool = False,
                             op: Any = horovod.Average, gradient_predivide_factor: float = 1.0,
                             num_groups: int = 0, groups: Any = None,
                             process_set: Any = horovod.global_process_set, local_layers: Any = None,
                             scale_local_gradients: bool = True, **extensions: Any) -> Any:
    """Wrap a tape so that it leaves the gradients of ``local_layers`` on their rank.

    Args:
        gradtape: the tape to wrap.
        device_dense: Horovod's: the device for dense gradients.
        device_sparse: Horovod's: the device for ``tf.IndexedSlices``.
        compression: ``hvd.Compression.none``, ``fp16``, ``topk(...)`` or ``powersgd(...)``.
        sparse_as_dense: reduce ``tf.IndexedSlices`` as dense gradients.
        op: ``hvd.Average``, ``hvd.Sum`` or ``hvd.DelayCompensated(...)``.
        gradient_predivide_factor: Horovod's: divide by it before the sum, multiply after it.
        num_groups: Horovod's: the number of groups of gradients that are reduced together.
        groups: the number of groups, or a list of the variables of each.
        process_set: the ranks that train together.
        local_layers: a built Keras layer, or several.
        scale_local_gradients: divide their gradients by the number of ranks, as their share of a mean.
        extensions: ``preconditioner=`` and ``optimizer=``, as of ``DistributedGradientTape``.
    """
    local = local_variables(local_layers)
    tape = distributed_tape(
        gradtape, device_dense, device_sparse, compression, sparse_as_dense, op, gradient_predivide_factor,
        num_groups, groups, process_set, scale_local_gradients, **extensions)
    for variable in local:
        tape.register_local_source(variable)
    return tape


class _Groups:
    """Lists of variables, equal when they are the same variables."""

    def __init__(self, groups: list[Any]) -> None:
        self.groups = groups
        self._key = tuple(tuple(id(as_tf(one)) for one in group) if isinstance(group, list)
                          else id(group) for group in groups)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Groups) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@dataclass(frozen=True)
class TapeSettings:
    """What a tape's reducer is made of."""

    op: Any
    compression: Any
    sparse_as_dense: bool
    predivide: float
    process_set: Any
    device_dense: str
    device_sparse: str
    groups: Any
    keeps_state: bool

    def make_reducer(self) -> Reducer:
        """The reducer.

        Raises:
            ValueError: arguments contradict each other.
        """
        groups = self.groups.groups if isinstance(self.groups, _Groups) else self.groups
        return make_reducer(
            Collectives(self.process_set, device_dense=self.device_dense,
                        device_sparse=self.device_sparse),
            ReductionOptions(prefix="DistributedGradientTape", groups=groups,
                             sparse_as_dense=self.sparse_as_dense,
                             half=self.compression is horovod.Compression.fp16),
            op=self.op, compression=self.compression, predivide=self.predivide,
            allowed={**REDUCTIONS, **OTHER_REDUCTIONS})


@functools.lru_cache(maxsize=16)
def _check_settings(settings: TapeSettings) -> None:
    """Fail for bad settings, without groups, when the tape is made; once, as a tape is made each step."""
    settings.make_reducer()


def kept_reducer(owner: Any, settings: TapeSettings) -> Reducer:
    """The reducer of these settings that lives as long as ``owner``.

    A tape is made anew each step; what it compiled for the step before is kept with the optimizer,
    or with the first of the variables, and goes when they do.
    """
    owner = as_tf(owner)
    if not isinstance(owner, tf.Variable | keras.Optimizer):
        return settings.make_reducer()
    kept = owner.__dict__.setdefault(KEPT, {})
    if settings not in kept:
        while len(kept) >= MOST_KEPT:
            del kept[next(iter(kept))]
        kept[settings] = settings.make_reducer()
    return kept[settings]


def trace_again(optimizer: Any) -> None:
    """Let TensorFlow trace the function a second time: in this trace the loss scale is a number.

    ``scale_loss`` of a ``LossScaleOptimizer`` reads its variable only where the optimizer is built. A
    function whose first trace makes a variable is traced again before it runs, as where Keras builds it.

    Raises:
        RuntimeError: it cannot be traced again here.
    """
    try:
        optimizer.__dict__[AGAIN] = tf.Variable(0, trainable=False)
    except ValueError as error:
        raise RuntimeError(
            f"{optimizer.name!r} was not built when this function was traced, so that its loss scale would "
            "stay as it is: call optimizer.build(model.trainable_variables) before the first step") from error


def _multiply(gradient: Any, factor: tf.Tensor) -> Any:
    """A gradient times a 0-D number."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values * tf.cast(factor, gradient.dtype), gradient.indices,
                                gradient.dense_shape)
    return None if gradient is None else gradient * tf.cast(factor, gradient.dtype)

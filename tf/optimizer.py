"""``DistributedOptimizer``, in the argument order of ``horovod.tensorflow`` and in that of its Keras module.

Arguments are decided here; ``step.py`` is the optimizer itself.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import horovod.tensorflow as horovod
import keras
import tensorflow as tf
from horovod.tensorflow import DistributedOptimizer as HorovodOptimizer

from hvd_ext import checks
from hvd_ext.horovod_api.signatures import refuse_old_names
from hvd_ext.reducers import registry
from hvd_ext.reducers.delayed_update import check_overlap
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.sharding import Server, settings_of
from hvd_ext.tensorflow import keras_hooks
from hvd_ext.tensorflow.collectives import Collectives, refuse_session_graphs
from hvd_ext.tensorflow.distributed_optimizer_class import Distributed
from hvd_ext.tensorflow.persistence import pickling
from hvd_ext.tensorflow.reducers import REDUCERS, check_preconditioner, make_reducer
from hvd_ext.tensorflow.reducers.delayed_update import DelayedReducer
from hvd_ext.tensorflow.reducers.plain import PlainReducer
from hvd_ext.tensorflow.sharding.separability import check_separable
from hvd_ext.tensorflow.sharding.shards import cuts_variables
from hvd_ext.tensorflow.sharding.updater import make_server
from hvd_ext.tensorflow.step import Wrapper

EXTENSIONS = {"preconditioner", "server", "reset_per_rank_state",
              "overlap"}  # arguments that are not Horovod's
# What a class must not override for its gradients to be met between accumulation and clipping.
PASSED_THROUGH = ("apply", "_backend_apply_gradients", "_clip_gradients")


@refuse_old_names(late="overlap=hvd.DelayedUpdate(...)")
def DistributedOptimizer(optimizer: Any, name: str | None = None, use_locking: bool = False,
                         device_dense: str = "", device_sparse: str = "",
                         compression: Any = horovod.Compression.none,
                         sparse_as_dense: bool = False, backward_passes_per_step: int = 1,
                         op: Any = horovod.Average, gradient_predivide_factor: float = 1.0,
                         average_aggregated_gradients: bool = False, num_groups: int = 0,
                         groups: Any = None, process_set: Any = horovod.global_process_set,
                         scale_local_gradients: bool = True, **extensions: Any) -> Any:
    """Make an optimizer reduce gradients over all ranks before it applies them.

    A Keras optimizer is changed as :func:`hvd_ext.tensorflow.keras.DistributedOptimizer` says; a
    ``tf.compat.v1.train.Optimizer`` is given to Horovod's own.

    Args:
        optimizer: a Keras optimizer or a ``tf.compat.v1.train.Optimizer``.
        name: the beginning of its names in Horovod's timeline.
        use_locking: Horovod's, for ``tf.compat.v1`` optimizers.
        device_dense: Horovod's: the device for dense gradients.
        device_sparse: Horovod's: the device for ``tf.IndexedSlices``.
        compression: ``hvd.Compression.none``, ``fp16``, ``topk(...)`` or ``powersgd(...)``.
        op: ``hvd.Average``, ``hvd.Sum`` or ``hvd.DelayCompensated(...)``.
        sparse_as_dense: reduce ``tf.IndexedSlices`` as dense gradients.
        backward_passes_per_step: passes whose gradients are added up before a reduction.
        average_aggregated_gradients: divide their sum by the number of passes.
        gradient_predivide_factor: Horovod's: divide by it before the sum, multiply after it.
        num_groups: deprecated for ``groups``.
        groups: the number of groups, or a list of the variables of each.
        process_set: the ranks that train together; the others train alone.
        scale_local_gradients: divide local gradients by the number of ranks, as a share of a mean.
        extensions: ``preconditioner=``, ``server=`` and ``overlap=``, as of the Keras front end.
    """
    shared = {
        "name": name, "device_dense": device_dense, "device_sparse": device_sparse,
        "compression": compression, "sparse_as_dense": sparse_as_dense,
        "backward_passes_per_step": backward_passes_per_step, "op": op,
        "gradient_predivide_factor": gradient_predivide_factor,
        "average_aggregated_gradients": average_aggregated_gradients, "num_groups": num_groups,
        "groups": groups, "process_set": process_set,
        "scale_local_gradients": scale_local_gradients,
    }
    if not isinstance(optimizer, tf.compat.v1.train.Optimizer):
        return KerasDistributedOptimizer(optimizer, **shared, **extensions)
    unknown = set(extensions) - EXTENSIONS
    if unknown:
        raise TypeError(f"DistributedOptimizer has no argument {', '.join(sorted(unknown))}")
    asked = [name + "=" for name, value in extensions.items() if value not in (None, False)]
    asked += [registry.public_name(one) for one in (op, compression) if type(one) in REDUCERS]
    if asked:
        raise NotImplementedError(
            f"{', '.join(asked)} with a tf.compat.v1 optimizer, which Horovod's own DistributedOptimizer "
            "wraps: use a Keras optimizer, without tf.compat.v1.disable_eager_execution(), or leave it out")
    return HorovodOptimizer(optimizer, use_locking=use_locking, **shared)


@refuse_old_names(late="overlap=hvd.DelayedUpdate(...)")
def KerasDistributedOptimizer(
        optimizer: Any, name: str | None = None, device_dense: str = "",
               device_sparse: str = "", compression: Any = horovod.Compression.none,
               sparse_as_dense: bool = False, gradient_predivide_factor: float = 1.0,
               op: Any = horovod.Average, backward_passes_per_step: int = 1,
               average_aggregated_gradients: bool = False, num_groups: int = 0, groups: Any = None,
               process_set: Any = horovod.global_process_set, scale_local_gradients: bool = True,
               *, preconditioner: Any = None, server: str | Server | None = None,
               reset_per_rank_state: bool = False, overlap: Any = None) -> Any:
    """Make a Keras optimizer reduce gradients over all ranks before it applies them.

    The optimizer given is changed in place and returned: its class (by ``isinstance`` and by
    name), its state if it has any, its schedules, clipping, weight decay and averages stay.

    Args:
        optimizer: a ``keras.optimizers.Optimizer``, also a ``LossScaleOptimizer``.
        name: prefix of the operations' names in Horovod's timeline; by default the optimizer's class.
        op: ``Average``, ``Sum`` or ``DelayCompensated(...)``.
        compression: ``Compression.none``, ``Compression.fp16`` or ``Compression.topk(...)``.
        preconditioner: ``SENG(model, ...)``: what the reduced gradient is turned into.
        server: where the update runs: "replicated" (as without it), "rank0", or "sharded", each
            variable's on its owner; a rank keeps the optimizer's state of what it owns.
            ``Server("sharded", downlink=...)`` where the new weights are to come back compressed.
        reset_per_rank_state: when the optimizer's variables are loaded from a file, start anew
            the state that belongs to one rank (TopK's residuals, MeanSquare).
        overlap: ``DelayedUpdate(...)``: exchange gradients beside the next step's compute and apply them
            then. ``optimizer.flush()`` takes the last update.
        device_dense: Horovod's: the device for dense gradients.
        device_sparse: Horovod's: the device for ``tf.IndexedSlices``.
        sparse_as_dense: reduce ``tf.IndexedSlices`` as dense gradients.
        backward_passes_per_step: passes whose gradients are added up before a reduction.
        average_aggregated_gradients: divide their sum by the number of passes.
        gradient_predivide_factor: Horovod's: divide by it before the sum, multiply after it.
        num_groups: deprecated for ``groups``.
        groups: the number of groups, or a list of the variables of each.
        process_set: the ranks that train together; the others train alone.
        scale_local_gradients: divide local gradients by the number of ranks, as a share of a mean.

    Raises:
        RuntimeError: Keras runs on another backend than TensorFlow.
        TypeError: ``optimizer`` is no Keras optimizer.
        ValueError: it is distributed already, arguments contradict each other, or the optimizer cannot be
            used with ``server``.
        NotImplementedError: an extension that the TensorFlow front end does not have.
    """
    keras_hooks.require_tensorflow_backend("hvd.DistributedOptimizer")
    if not isinstance(optimizer, keras.Optimizer):
        raise TypeError(f"optimizer must be a keras.optimizers.Optimizer, got {optimizer!r}")
    if keras_hooks.wrapper_of(optimizer) is not None:
        raise ValueError(
            f"the optimizer {optimizer.name!r} is distributed already: its gradients would be "
            "reduced twice; call hvd.DistributedOptimizer once (hvd.load_model does it too)")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # The inner one meets gradients unscaled; whether they are finite is agreed on before.
        KerasDistributedOptimizer(
            optimizer.inner_optimizer, name, device_dense, device_sparse, compression,
            sparse_as_dense, gradient_predivide_factor, op, backward_passes_per_step,
            average_aggregated_gradients, num_groups, groups, process_set, scale_local_gradients,
            preconditioner=preconditioner, server=server,
            reset_per_rank_state=reset_per_rank_state, overlap=overlap)
        return optimizer
    passes = checks.check_int("backward_passes_per_step", backward_passes_per_step, low=1)
    if passes > 1 and optimizer.gradient_accumulation_steps:
        raise ValueError(
            f"backward_passes_per_step={passes} and the optimizer's gradient_accumulation_steps="
            f"{optimizer.gradient_accumulation_steps} both accumulate gradients; give one of them")
    if num_groups:
        warnings.warn("num_groups has been replaced by groups", DeprecationWarning, stacklevel=3)
        groups = num_groups if groups is None else groups
    check_preconditioner(preconditioner)
    collectives = Collectives(process_set, device_dense=device_dense, device_sparse=device_sparse)
    given = {"op": op, "compression": compression, "preconditioner": preconditioner, "server": server,
             "overlap": overlap}
    if not collectives.is_member:  # it trains alone, without extensions, as in PyTorch
        op = op if type(op) not in REDUCERS else horovod.Average
        compression = compression if type(compression) not in REDUCERS else horovod.Compression.none
        preconditioner = server = overlap = None
    settings = None if server is None else settings_of(server)
    where = None if settings is None else settings.kind
    placed = make_server(settings, optimizer, collectives, groups)
    if placed is not None:
        check_extension(optimizer, f"server={where!r}")
        check_separable(optimizer, placed.settings,
                        cut=cuts_variables(placed.settings, optimizer, collectives))
    options = ReductionOptions(
        prefix=name or type(optimizer).__name__, passes=passes, groups=groups,
        average_passes=average_aggregated_gradients, sparse_as_dense=sparse_as_dense,
        half=compression is horovod.Compression.fp16)
    reducer = make_reducer(collectives, options, op=op, compression=compression,
                           predivide=gradient_predivide_factor,
                           owners=placed if where == "sharded" and preconditioner is None and overlap is None
                           else None)
    check_overlap(overlap, preconditioner=preconditioner, passes_apart=bool(reducer.parts_shape()),
               multiple_evaluations=False)
    if overlap is not None:
        refuse_session_graphs("overlap=")
        check_extension(optimizer, "overlap=")
        if optimizer.gradient_accumulation_steps:
            raise ValueError(
                "overlap= cannot be combined with the optimizer's gradient_accumulation_steps="
                f"{optimizer.gradient_accumulation_steps}, which would count flush() as a batch; use "
                "backward_passes_per_step")
        reducer = DelayedReducer(reducer, overlap, options)
    reducer.extensions = (f"preconditioner: {type(preconditioner).__name__}",
                          *(["server: None"] if settings is None else settings.fingerprint_lines()))
    if not isinstance(reducer, PlainReducer):
        check_extension(optimizer, type(reducer).__name__.removesuffix("Reducer"))
    if preconditioner is not None:
        check_extension(optimizer, "SENG")
    keras_hooks.install_hooks()
    pickling.install_copies()
    wrapper = Wrapper(reducer, standard=passes_through(optimizer),
                      scale_local=scale_local_gradients, preconditioner=preconditioner,
                      server=placed, where=where, reset_per_rank_state=reset_per_rank_state)
    wrapper.given = {
        "name": name, "device_dense": device_dense, "device_sparse": device_sparse,
        "sparse_as_dense": sparse_as_dense, "gradient_predivide_factor": gradient_predivide_factor,
        "backward_passes_per_step": passes, "average_aggregated_gradients": average_aggregated_gradients,
        "groups": groups, "process_set": process_set, "scale_local_gradients": scale_local_gradients,
        **given}
    object.__setattr__(optimizer, keras_hooks.ATTRIBUTE, wrapper)
    object.__setattr__(optimizer, "__class__", distributed_class(type(optimizer)))
    if optimizer.built:
        wrapper.create_state(optimizer, list(optimizer._trainable_variables))
    return optimizer


def StandaloneKerasDistributedOptimizer(
        optimizer: Any, name: str | None = None, device_dense: str = "", device_sparse: str = "",
        compression: Any = horovod.Compression.none, sparse_as_dense: bool = False,
        gradient_predivide_factor: float = 1.0, op: Any = horovod.Average, num_groups: int = 0,
        groups: Any = None, **options: Any) -> Any:
    """``KerasDistributedOptimizer`` with the argument order of ``horovod.keras``."""
    return KerasDistributedOptimizer(
        optimizer, name, device_dense, device_sparse, compression, sparse_as_dense,
        gradient_predivide_factor, op, num_groups=num_groups, groups=groups, **options)


def PartialDistributedOptimizer(
        optimizer: Any, name: str | None = None, device_dense: str = "", device_sparse: str = "",
        compression: Any = horovod.Compression.none, sparse_as_dense: bool = False,
        gradient_predivide_factor: float = 1.0, op: Any = horovod.Average, groups: Any = None,
        process_set: Any = horovod.global_process_set, local_layers: Any = None,
        scale_local_gradients: bool = True, **extensions: Any) -> Any:
    """Make an optimizer distributed, and leave the gradients of ``local_layers`` on their rank.

    Args:
        optimizer: a Keras optimizer.
        name: the beginning of its names in Horovod's timeline.
        device_dense: Horovod's: the device for dense gradients.
        device_sparse: Horovod's: the device for ``tf.IndexedSlices``.
        compression: ``Compression.none``, ``Compression.fp16`` or ``Compression.topk(...)``.
        op: ``Average``, ``Sum`` or ``DelayCompensated(...)``.
        sparse_as_dense: reduce ``tf.IndexedSlices`` as dense gradients.
        gradient_predivide_factor: Horovod's: divide by it before the sum, multiply after it.
        groups: the number of groups, or a list of the variables of each.
        process_set: the ranks that train together; the others train alone.
        local_layers: a built Keras layer, or several.
        scale_local_gradients: divide their gradients by the number of ranks, as their share of a mean.
        extensions: ``preconditioner=``, ``server=`` and ``overlap=``, as of ``DistributedOptimizer``.

    Raises:
        ValueError: something in ``local_layers`` is no Keras layer, or has no weights yet.
    """
    local = local_variables(local_layers)
    optimizer = KerasDistributedOptimizer(
        optimizer, name, device_dense, device_sparse, compression, sparse_as_dense,
        gradient_predivide_factor, op, groups=groups, process_set=process_set,
        scale_local_gradients=scale_local_gradients, **extensions)
    for variable in local:
        keras_hooks.distributed_part(optimizer).register_local_var(variable)
    return optimizer


def local_variables(layers: Any) -> list[Any]:
    """The trainable weights of ``local_layers=``: a layer, several, or None.

    Raises:
        ValueError: something is no Keras layer, or has no weights yet.
    """
    layers = [layers] if isinstance(layers, keras.Layer) else list(layers or [])
    if not all(isinstance(layer, keras.Layer) for layer in layers):
        raise ValueError(f"local_layers must be Keras layers, got {layers!r}")
    unbuilt = [layer.name for layer in layers if not layer.built]
    if unbuilt:
        raise ValueError(f"local_layers {', '.join(unbuilt)} have no weights yet; call the model on a "
                         "batch, or model.build(input_shape), first")
    return [variable for layer in layers for variable in layer.trainable_weights]


def passes_through(optimizer: Any) -> bool:
    """Whether its class leaves the way of a gradient from ``apply`` to clipping as Keras has it."""
    return all(getattr(type(optimizer), name) is getattr(keras.Optimizer, name)
               for name in PASSED_THROUGH)


def check_extension(optimizer: Any, what: str) -> None:
    """Refuse optimizers that the extension ``what`` cannot serve.

    Raises:
        NotImplementedError: the optimizer has its own way of a gradient.
    """
    if not passes_through(optimizer):
        raise NotImplementedError(
            f"{what} with {type(optimizer).__name__}, which handles gradients in a way of its own: "
            "wrap a plain optimizer, or leave the extension out")


@functools.cache
def distributed_class(wrapped: type) -> type:
    """A subclass of ``wrapped`` under its name, so that saved models load without this package."""
    kind = type(wrapped.__name__, (Distributed, wrapped), {
        "__module__": wrapped.__module__, "__qualname__": wrapped.__qualname__,
        "__doc__": wrapped.__doc__})
    registered = keras.saving.get_registered_name(wrapped)
    if registered != wrapped.__name__:
        keras.src.saving.object_registration.GLOBAL_CUSTOM_NAMES[kind] = registered
    return kind

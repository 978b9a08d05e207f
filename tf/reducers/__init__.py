"""Which reducer serves which settings: the one table, for ``op=`` and for ``compression=``."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as horovod
import keras
import tensorflow as tf

from hvd_ext.reducers import registry
from hvd_ext.reducers.buckets import check_groups
from hvd_ext.reducers.delay_compensation import DelayCompensated
from hvd_ext.reducers.options import DenseReduction, ReductionOptions
from hvd_ext.reducers.powersgd import PowerSGD
from hvd_ext.reducers.topk import TopK
from hvd_ext.tensorflow.collectives import Collectives, refuse_session_graphs
from hvd_ext.tensorflow.compression import Compression
from hvd_ext.tensorflow.reducers.base import Reducer
from hvd_ext.tensorflow.reducers.delay_compensation import DelayReducer
from hvd_ext.tensorflow.reducers.plain import PlainReducer
from hvd_ext.tensorflow.reducers.powersgd import PowerSGDReducer
from hvd_ext.tensorflow.reducers.sharded import ShardedReducer
from hvd_ext.tensorflow.reducers.topk import TopKReducer
from hvd_ext.tensorflow.variables import as_tf

REDUCERS: dict[Any, type[Reducer]] = {}
REDUCTIONS = {"Average": horovod.Average, "Sum": horovod.Sum}
OTHER_REDUCTIONS = {"Adasum": horovod.Adasum, "Min": horovod.Min, "Max": horovod.Max,
                    "Product": horovod.Product}


def register_reducer(settings: type, reducer: type[Reducer], *, replace: bool = False) -> None:
    """Make ``DistributedOptimizer`` and the tape use ``reducer`` for instances of ``settings``.

    Args:
        settings: a frozen dataclass with the class attributes ``slot`` ("op" or "compression", the
            argument that takes it) and ``label``, its name in Horovod's timeline; in the
            compression slot ``hvd.Compression.<label>`` becomes this type.
        reducer: a subclass of :class:`hvd_ext.tensorflow.reducers.base.Reducer`, usually of
            :class:`~hvd_ext.tensorflow.reducers.buckets.BucketReducer` or
            :class:`~hvd_ext.tensorflow.reducers.error_feedback.FeedbackReducer`.
        replace: allow to replace settings or a label that exist.

    Raises:
        TypeError: ``settings`` is not such a dataclass, or ``reducer`` not such a class.
        ValueError: the type or its label is registered already and ``replace`` is False.
    """
    if not (isinstance(reducer, type) and issubclass(reducer, Reducer)):
        raise TypeError(f"reducer must be a subclass of Reducer, got {reducer!r}")
    registry.register_settings(settings, reducer, REDUCERS, Compression, replace=replace)


register_reducer(DelayCompensated, DelayReducer)
register_reducer(TopK, TopKReducer)
register_reducer(PowerSGD, PowerSGDReducer)


def make_reducer(collectives: Collectives, options: ReductionOptions, *, op: Any, compression: Any,
                 predivide: float = 1.0, allowed: dict[str, Any] = REDUCTIONS,
                 owners: Any = None) -> Reducer:
    """The reducer that ``op`` and ``compression`` ask for; of Horovod's operations ``allowed`` ones.

    Args:
        owners: the ``ShardedUpdater`` whose owners need their own gradients only, if any.

    Raises:
        ValueError: an unknown op, or arguments that cannot be combined.
        NotImplementedError: an extension that the TensorFlow front end does not have.
    """
    check_groups(options.groups, member=(tf.Variable, keras.Variable), what="tf.Variable",
                 key=lambda variable: id(as_tf(variable)))
    names = [name for name, reduction in allowed.items() if op is reduction or op == reduction]
    if not names and type(op) not in REDUCERS:
        raise ValueError(f"op must be one of {', '.join('hvd.' + name for name in allowed)} or "
                         f"hvd.DelayCompensated(...) here, got {op!r}")
    if type(compression) not in REDUCERS:
        _check_compression(compression)
    settings = registry.choose_settings(
        REDUCERS, op=op, compression=compression, op_name=names[0] if names else "",
        casts=(Compression.none, Compression.fp16), predivide=predivide)
    if settings is None:
        if (owners is not None and names[0] in REDUCTIONS and predivide == 1.0
                and compression in (Compression.none, Compression.fp16)):
            return ShardedReducer(collectives, DenseReduction(op, compression), options, owners)
        average = predivide if names[0] == "Average" else 1.0
        return PlainReducer(collectives, DenseReduction(op, compression, average), options)
    refuse_session_graphs(registry.public_name(settings))
    return REDUCERS[type(settings)](collectives, settings, options)


def check_preconditioner(preconditioner: Any) -> None:
    """Refuse what is no preconditioner.

    Raises:
        TypeError: it is none.
        NotImplementedError: in a graph of TensorFlow 1.
    """
    if preconditioner is None:
        return
    if not hasattr(preconditioner, "precondition"):
        raise TypeError(f"preconditioner must be hvd.SENG(model, ...), got {preconditioner!r}")
    refuse_session_graphs(f"preconditioner={type(preconditioner).__name__}")


def _check_compression(compression: Any) -> None:
    if not (hasattr(compression, "compress") and hasattr(compression, "decompress")):
        known = ["none", "fp16", *(f"{one.label}(...)" for one in REDUCERS
                                   if one.slot == "compression")]
        raise ValueError(f"compression must be hvd.Compression.{', .'.join(known)}, "
                         f"got {compression!r}")

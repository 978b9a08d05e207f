"""Which reducer serves which settings: the one table, for ``op=`` and for ``compression=``."""

from __future__ import annotations

import functools
from typing import Any

import horovod.torch as horovod
import torch

from hvd_ext.reducers import registry
from hvd_ext.reducers.buckets import check_groups
from hvd_ext.reducers.delay_compensation import DelayCompensated, DelayedUpdate
from hvd_ext.reducers.options import DenseReduction, ReductionOptions
from hvd_ext.reducers.powersgd import PowerSGD
from hvd_ext.reducers.topk import TopK
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.compression import Compression
from hvd_ext.torch.reducers.base import Reducer
from hvd_ext.torch.reducers.delay_compensation import DelayReducer
from hvd_ext.torch.reducers.delayed_update import DelayedReducer
from hvd_ext.torch.reducers.plain import PlainReducer
from hvd_ext.torch.reducers.powersgd import PowerSGDReducer
from hvd_ext.torch.reducers.sharded import ShardedReducer
from hvd_ext.torch.reducers.topk import TopKReducer

REDUCERS: dict[Any, type[Reducer]] = {}


def register_reducer(settings: type, reducer: type[Reducer], *, replace: bool = False) -> None:
    """Make ``DistributedOptimizer`` use ``reducer`` where it is given an instance of ``settings``.

    Args:
        settings: a frozen dataclass with the class attributes ``slot`` ("op" or "compression", the
            argument that takes it) and ``label``, its name in Horovod's timeline; in the
            compression slot ``hvd.Compression.<label>`` becomes this type.
        reducer: a subclass of :class:`hvd_ext.torch.reducers.base.Reducer`, usually of
            :class:`~hvd_ext.torch.reducers.buckets.BucketReducer` or
            :class:`~hvd_ext.torch.reducers.error_feedback.FeedbackReducer`.
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
                 predivide: float = 1.0, server: str | None = None,
                 multiple_evaluations: bool = False, owners: Any = None,
                 overlap: DelayedUpdate | None = None) -> Reducer:
    """The reducer that ``op`` and ``compression`` ask for.

    Args:
        owners: the ``ShardedUpdater`` whose owners need their own gradients only, if any.
        overlap: how gradients are applied one step late, if they are; owners then get all of them.

    Raises:
        ValueError: arguments that cannot be combined.
    """
    check_groups(options.groups, member=torch.Tensor, what="torch.Tensor")
    plain = op if type(op) not in REDUCERS else None
    settings = registry.choose_settings(
        REDUCERS, op=op, compression=compression, op_name=registry.op_name(plain),
        casts=(Compression.none, Compression.fp16), predivide=predivide, server=server,
        multiple_evaluations=multiple_evaluations)
    if overlap is not None:
        make = functools.partial(_make_reducer, collectives, settings, op=op, compression=compression,
                                 predivide=predivide, owners=None)
        return DelayedReducer(make, overlap, options)
    return _make_reducer(collectives, settings, options, op=op, compression=compression, predivide=predivide,
                         owners=owners)


def _make_reducer(collectives: Collectives, settings: Any, options: ReductionOptions, *, op: Any,
                  compression: Any,
                  predivide: float, owners: Any) -> Reducer:
    if settings is None:
        to_owners = (owners is not None and op in (horovod.Average, horovod.Sum) and predivide == 1.0
                     and compression in (Compression.none, Compression.fp16))
        if to_owners:
            return ShardedReducer(collectives, DenseReduction(op, compression), options, owners)
        average = predivide if op == horovod.Average else 1.0
        return PlainReducer(collectives, DenseReduction(op, compression, average), options)
    return REDUCERS[type(settings)](collectives, settings, options)

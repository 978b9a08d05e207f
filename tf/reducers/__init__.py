"""Which reducer the arguments ``op`` and ``compression`` ask for."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as horovod
import keras
import tensorflow as tf

from hvd_ext import composition
from hvd_ext.buckets import check_groups
from hvd_ext.delay import DelayCompensated
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reducers.base import PlainReducer, Reducer
from hvd_ext.tensorflow.reducers.delay import DelayReducer
from hvd_ext.tensorflow.reducers.topk import TopKReducer
from hvd_ext.tensorflow.variables import as_tf
from hvd_ext.topk import TopK

REDUCTIONS = {"Average": horovod.Average, "Sum": horovod.Sum}
OTHER_REDUCTIONS = {"Adasum": horovod.Adasum, "Min": horovod.Min, "Max": horovod.Max,
                    "Product": horovod.Product}


def make_reducer(collectives: Collectives, prefix: str, *, op: Any, compression: Any,
                 sparse_as_dense: bool, gradient_predivide_factor: float, groups: Any,
                 passes: int = 1, average_passes: bool = False,
                 allowed: dict[str, Any] = REDUCTIONS) -> Reducer:
    """The reducer of ``op`` and ``compression``, whose names start with ``prefix``.

    Raises:
        ValueError: an unknown op, or arguments that contradict each other.
        NotImplementedError: an extension that the TensorFlow front end does not have.
    """
    delay = isinstance(op, DelayCompensated)
    topk = isinstance(compression, TopK)
    names = [name for name, reduction in allowed.items() if op is reduction or op == reduction]
    if not names and not delay:
        raise ValueError(f"op must be one of {', '.join('hvd.' + name for name in allowed)} or "
                         f"hvd.DelayCompensated(...) here, got {op!r}")
    check_groups(groups, member=(tf.Variable, keras.Variable), what="tf.Variable",
                 key=lambda variable: id(as_tf(variable)))
    composition.check(op=op if delay else None, compression=compression if topk else None,
                      op_name="Average" if delay else names[0],
                      predivide=gradient_predivide_factor, server=None)
    options = {"groups": groups, "sparse_as_dense": sparse_as_dense}
    if topk:
        return TopKReducer(collectives, prefix, compression, **options)
    _check_compression(compression)
    if not delay:
        return PlainReducer(collectives, prefix, op=op, compression=compression,
                            gradient_predivide_factor=gradient_predivide_factor, **options)
    microbatch = op.virtual_workers == "microbatch"
    if microbatch and passes == 1:
        raise ValueError(
            "virtual_workers='microbatch' needs backward_passes_per_step above 1, the number of "
            "micro-batches a step; got 1. Pass it, or use virtual_workers='rank'")
    return DelayReducer(collectives, prefix, op, parts=passes if microbatch else 1,
                        mean_of_parts=average_passes, half=compression is horovod.Compression.fp16,
                        **options)


def check_preconditioner(preconditioner: Any) -> None:
    """Refuse what is no preconditioner.

    Raises:
        TypeError: it is none.
    """
    if preconditioner is not None and not hasattr(preconditioner, "precondition"):
        raise TypeError(f"preconditioner must be hvd.SENG(model, ...), got {preconditioner!r}")


def _check_compression(compression: Any) -> None:
    if not (hasattr(compression, "compress") and hasattr(compression, "decompress")):
        raise ValueError(f"compression must be hvd.Compression.none, .fp16 or .topk(...), got "
                         f"{compression!r}")

"""Which reducer the arguments ``op`` and ``compression`` ask for."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as horovod

from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reduce import PlainReducer, Reducer

REDUCTIONS = (horovod.Average, horovod.Sum)


def make_reducer(collectives: Collectives, prefix: str, *, op: Any, compression: Any,
                 sparse_as_dense: bool, gradient_predivide_factor: float, groups: Any,
                 passes: int = 1, allowed: tuple[Any, ...] = REDUCTIONS) -> Reducer:
    """The reducer of ``op`` and ``compression``, whose names start with ``prefix``.

    Raises:
        ValueError: an unknown op, or arguments that contradict each other.
        NotImplementedError: an extension that the TensorFlow front end does not have.
    """
    del passes
    if not any(op is reduction or op == reduction for reduction in allowed):
        raise ValueError(f"op must be hvd.Average or hvd.Sum here, got {op!r}")
    if not (hasattr(compression, "compress") and hasattr(compression, "decompress")):
        raise NotImplementedError(
            f"compression={compression!r} is not available in the TensorFlow front end; use "
            "hvd.Compression.none or hvd.Compression.fp16")
    if gradient_predivide_factor != 1.0 and op != horovod.Average:
        raise ValueError(f"gradient_predivide_factor={gradient_predivide_factor} needs "
                         "op=hvd.Average; leave it at 1.0")
    if groups is not None and not (isinstance(groups, list) or
                                   (isinstance(groups, int) and groups > 0)):
        raise ValueError("groups must be a number of groups above 0 or a list of lists of "
                         f"variables, got {groups!r}")
    return PlainReducer(collectives, prefix, op=op, compression=compression,
                        sparse_as_dense=sparse_as_dense, groups=groups,
                        gradient_predivide_factor=gradient_predivide_factor)

"""Horovod's operations for bfloat16 tensors, which its TensorFlow operations do not know.

They travel as float32: every bfloat16 number is one, sums are rounded once, and gradients of the
operations stay. That is twice the bytes; ``Compression.fp16`` halves them again. Where no gradient
is asked for (``broadcast_variables``, ``server=``) the 16 bits travel as an integer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from hvd_ext.tensorflow.collectives import NARROW


def widened(operation: Callable[..., Any]) -> Callable[..., Any]:
    """``operation(tensor or list of tensors, ...)`` that also takes what travels as float32.

    Its results have the dtypes of what it was given; further results (``alltoall``'s received
    splits) are left as they are.
    """

    first = next(iter(inspect.signature(operation).parameters))

    @functools.wraps(operation)
    def run(*args: Any, **options: Any) -> Any:
        if not args and first not in options:
            return operation(**options)  # says what is missing
        given, args = (args[0], args[1:]) if args else (options.pop(first), ())
        if isinstance(given, (list, tuple)):
            if not any(_is_narrow(one) for one in given):
                return operation(given, *args, **options)
            results = operation([_wide(one) for one in given], *args, **options)
            return [_as(result, one) for result, one in zip(results, given, strict=True)]
        if not _is_narrow(given):
            return operation(given, *args, **options)
        result = operation(_wide(given), *args, **options)
        if isinstance(result, tuple) and not isinstance(given, tf.IndexedSlices):
            return _as(result[0], given), *result[1:]
        return _as(result, given)

    return run


def _is_narrow(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and not isinstance(value, str) and str(getattr(dtype, "name", dtype)) in {
        narrow.name for narrow in NARROW}


def _wide(value: Any) -> Any:
    return tf.cast(value, tf.float32) if _is_narrow(value) else value


def _as(result: Any, given: Any) -> Any:
    return tf.cast(result, given.dtype) if _is_narrow(given) else result

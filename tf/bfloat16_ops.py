"""Horovod's operations for bfloat16 tensors, which its TensorFlow operations do not know.

They travel as float32: every bfloat16 number is one, sums are rounded once, and gradients of the
operations stay. That is twice the bytes; ``Compression.fp16`` halves them again. Where no gradient
is asked for (``broadcast_variables``, ``server=``) the 16 bits travel as an integer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from hvd_ext.horovod_api.signatures import copy_signature
from hvd_ext.tensorflow.collectives import NARROW


def via_float32(operation: Callable[..., Any]) -> Callable[..., Any]:
    """``operation(tensor or list of tensors, ...)`` that also takes what travels as float32.

    Its results have the dtypes of what it was given; further results (``alltoall``'s received
    splits) are left as they are.
    """

    first = next(iter(inspect.signature(operation).parameters))

    @copy_signature(operation, tf.autograph.experimental.do_not_convert)
    def run(**arguments: Any) -> Any:
        given = arguments[first]
        if isinstance(given, (list, tuple)):
            if not any(_is_narrow(one) for one in given):
                return operation(**arguments)
            results = operation(**{**arguments, first: [_to_float32(one) for one in given]})
            return [_to_given(result, one) for result, one in zip(results, given, strict=True)]
        if not _is_narrow(given):
            return operation(**arguments)
        result = operation(**{**arguments, first: _to_float32(given)})
        if isinstance(result, tuple) and not isinstance(given, tf.IndexedSlices):
            return _to_given(result[0], given), *result[1:]
        return _to_given(result, given)

    return run


def _is_narrow(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and not isinstance(value, str) and str(getattr(dtype, "name", dtype)) in {
        narrow.name for narrow in NARROW}


def _to_float32(value: Any) -> Any:
    return tf.cast(value, tf.float32) if _is_narrow(value) else value


def _to_given(result: Any, given: Any) -> Any:
    return tf.cast(result, given.dtype) if _is_narrow(given) else result

"""How a model's layers see its samples: two passes, the second with the samples in another order.

The passes leave no trace: no gradients, ``training=False``, variables, losses and the context of Keras'
calls as before. Where the pass under way is being traced, numbers are drawn for the inputs, of their
shapes and dtypes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvd_ext.seng.sample_axes import Signature, shuffled_order

SAMPLES = 5  # of a pass with inputs that are drawn, where the model leaves the batch open
UNKNOWN_EXTENT = 8  # along other axes that the model leaves open
TRIES = 20
CALLS = "current_call_ctx"  # Keras' name for what it knows of the calls under way


def batch_of(args: Any, kwargs: Any, axis: int) -> Any:
    """The first tensor among a model's arguments that has the axis of the samples, or None."""
    for leaf in keras.tree.flatten((args, kwargs)):
        if _is_input(leaf) and len(leaf.shape) > axis:
            return leaf
    return None


def axis_signature(x: np.ndarray, batch: int) -> Signature:
    """``x`` with every row of axis 0, and of each axis as long as the batch, as one number."""
    exact = x.dtype.kind in "iub" or x.dtype == np.float64
    epsilon = 0.0 if exact else 2.0**-7 if x.dtype.name == "bfloat16" else float(np.finfo(x.dtype).eps)
    rounding = 1e-12 if exact else min(1e3 * epsilon, 0.05)
    values = x.astype(np.float64)
    axes = {}
    for axis in range(values.ndim):
        if axis == 0 or values.shape[axis] == batch:
            length = values.shape[axis]  # 0 for an expert that gets no token
            rows = np.moveaxis(values, axis, 0).reshape(length, values.size // max(length, 1))
            axes[axis] = rows @ np.random.default_rng(0).standard_normal(rows.shape[1])
    return Signature(axes, rounding * float(np.linalg.norm(values)))


def inputs_of_a_pass(args: Any, kwargs: Any, axis: int) -> tuple[Any, Any, int]:
    """Arguments to call the model with, and their number of samples.

    Args:
        args, kwargs: tensors with numbers are taken as they are; for those of a graph, and for Keras'
            descriptions of inputs, numbers are drawn.
    """
    first = batch_of(args, kwargs, axis)
    if first is None:
        raise ValueError(f"none of the model's inputs has an axis {axis}")
    extent, rng = first.shape[axis], np.random.default_rng(0)
    drawn = extent is None or extent == 1 or not _has_numbers(first)
    batch = SAMPLES if extent is None or extent == 1 else int(extent)

    def taken(leaf: Any) -> Any:
        if not _is_input(leaf):
            return leaf
        if not drawn and _has_numbers(leaf):
            return leaf
        shape = [UNKNOWN_EXTENT if one is None else int(one) for one in leaf.shape]
        if len(shape) > axis and leaf.shape[axis] == extent:
            shape[axis] = batch
        kind = leaf.dtype if isinstance(leaf.dtype, str) else leaf.dtype.name
        if kind == "bool" or "int" in kind:
            return tf.cast(_whole_numbers(rng, shape, axis), kind)
        return tf.cast(rng.standard_normal(shape), kind)

    return *keras.tree.map_structure(taken, (args, kwargs)), batch


def two_passes(model: keras.Model, args: Any, kwargs: Any, *, batch: int, axis: int,
               begin: Callable[[], None], enough: Callable[[], bool]) -> None:
    """Call ``model`` on its arguments and on the same with the samples :func:`shuffled_order`.

    Args:
        begin: called before each pass.
        enough: called after the first; the second is left out where it says so.
    """
    order = shuffled_order(batch)

    def moved(leaf: Any) -> Any:
        if _is_input(leaf) and len(leaf.shape) > axis and leaf.shape[axis] == batch:
            return tf.gather(leaf, order, axis=axis)
        return leaf

    for k in range(2):
        begin()
        with _left_unchanged():
            model(*args, **{**kwargs, "training": False})
        if not k and enough():
            return
        args, kwargs = keras.tree.map_structure(moved, (args, kwargs))


@contextlib.contextmanager
def _left_unchanged() -> Iterator[None]:
    """Variables, losses, and what Keras knows of the calls under way, are as before afterwards."""
    state = keras.src.backend.common.global_state
    under_way = state.get_global_attribute(CALLS)
    state.set_global_attribute(CALLS, None)
    try:
        with keras.StatelessScope(collect_losses=True):
            yield
    finally:
        state.set_global_attribute(CALLS, under_way)


def _whole_numbers(rng: np.random.Generator, shape: list[int], axis: int) -> np.ndarray:
    """Zeros and ones, which every table has rows for; no two samples the same where that can be."""
    for _ in range(TRIES):
        drawn = rng.integers(0, 2, shape)
        if len(shape) <= axis:
            break
        rows = np.moveaxis(drawn, axis, 0).reshape(shape[axis], -1)
        if len(np.unique(rows, axis=0)) == len(rows):
            break
    return drawn


def _has_numbers(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) or (tf.is_tensor(leaf) and hasattr(leaf, "numpy"))


def _is_input(leaf: Any) -> bool:
    return tf.is_tensor(leaf) or isinstance(leaf, (np.ndarray, keras.KerasTensor))

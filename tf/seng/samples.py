"""Which rows of a layer's input belong to which sample of the batch.

Most layers have the samples along their first axis. Windows, or batch and time reshaped into one axis, give
a layer several rows of each sample; a layer of a time-major part has the samples along its second axis. A
probe finds out which it is: a forward pass of three samples, the first and the last of them the same,
shows that rows of equal samples are equal under one arrangement only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvd_ext.tensorflow.seng.inventory import FIRST, NOT_CHECKED, UNKNOWN, Layer
from hvd_ext.tensorflow.seng.rules import Factors, Pick, Rows

UNKNOWN_EXTENT = 8  # of a probe, along axes that the model leaves open
TOLERANCE = 1e-3, 1e-5  # of the largest difference between rows, and of the largest number


class BatchSize:
    """The number of samples of the forward pass that is under way, from the model's own input."""

    def __init__(self) -> None:
        self._first: Any = None
        self._seen: dict[Layer, list[np.ndarray]] | None = None

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The model's ``call``, during which the batch is known."""
        @functools.wraps(call)
        def known(*args: Any, **kwargs: Any) -> Any:
            tensors = [one for one in keras.tree.flatten((args, kwargs)) if tf.is_tensor(one)]
            before, self._first = self._first, tensors[0] if tensors else None
            try:
                return call(*args, **kwargs)
            finally:
                self._first = before

        return known

    def now(self) -> Any:
        """The samples, 0-D int32; None outside of the model's ``call``."""
        return None if self._first is None else tf.shape(self._first)[0]

    def see(self, layer: Layer, x: tf.Tensor) -> None:
        """Keep a layer's input for the probe that is under way, if one is."""
        if self._seen is not None:
            self._seen.setdefault(layer, []).append(x.numpy())

    def probe(self, model: keras.Model, layers: Iterable[Layer]) -> None:
        """Set ``samples`` of each layer; what cannot be found out stays "not checked"."""
        given = getattr(model, "_inputs_struct", None)  # as the model's call takes them
        if given is None:
            given = getattr(model, "inputs", None)
            given = given[0] if given and len(given) == 1 else given
        if given is None or not tf.executing_eagerly():
            return
        rng = np.random.default_rng(0)
        seen: dict[Layer, list[np.ndarray]] = {}
        self._seen = seen
        try:
            model(keras.tree.map_structure(functools.partial(_three_samples, rng), given), training=False)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, tf.errors.OpError):
            return  # not an input that this model takes
        finally:
            self._seen = None
        for layer in layers:
            found = {arrangement(x) for x in seen.get(layer, ())}
            layer.samples = found.pop() if len(found) == 1 else UNKNOWN if found else NOT_CHECKED


def _three_samples(rng: np.random.Generator, spec: Any) -> np.ndarray:
    """Three samples for an input of the model, the last the same as the first."""
    shape = [UNKNOWN_EXTENT if extent is None else int(extent) for extent in spec.shape[1:]]
    whole = "int" in str(spec.dtype)
    two = rng.integers(0, 2, (2, *shape)) if whole else rng.standard_normal((2, *shape))
    return two[[0, 1, 0]].astype(str(spec.dtype))


def arrangement(x: np.ndarray) -> str:
    """Along which axis the samples of a probe lie, see ``Layer.samples``."""
    rows, shape = x.shape[0] if x.ndim else 0, x.shape
    views = {FIRST: x if rows == 3 else None,
             "contiguous": x.reshape(3, -1) if rows > 3 and rows % 3 == 0 else None,
             "strided": (np.swapaxes(x.reshape(rows // 3, 3, -1), 0, 1)
                         if rows > 3 and rows % 3 == 0 else None),
             "second": np.swapaxes(x, 0, 1) if x.ndim > 2 and shape[1] == 3 else None}
    fitting = [name for name, view in views.items() if view is not None and _same(view)]
    return FIRST if FIRST in fitting else fitting[0] if len(fitting) == 1 else UNKNOWN


def _same(view: np.ndarray) -> bool:
    """Whether the first and the last of three samples are the same."""
    wide = view.astype(np.float64)
    if not wide.size:
        return True
    spread = np.abs(wide - wide[:1]).max()
    limit = max(TOLERANCE[0] * spread, TOLERANCE[1] * np.abs(wide).max())
    return bool(np.abs(wide[0] - wide[2]).max() <= limit)


def regroup_axis(layer: Layer, x: tf.Tensor, gz: tf.Tensor, batch: tf.Tensor | None
                 ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """``x`` and ``gz`` with the samples, or their rows, along the first axis, and how many samples.

    Args:
        batch: the samples of the pass, 0-D int32; None where they are not known.
    """
    if layer.samples == "second":
        x, gz = (tf.transpose(one, [1, 0, *range(2, len(one.shape))]) for one in (x, gz))
    rows = tf.shape(gz)[0]
    if not layer.in_rows or batch is None:
        return x, gz, rows
    fits = tf.equal(rows % tf.maximum(batch, 1), 0)
    return x, gz, tf.where(fits, batch, rows)


def regroup(result: Any, how: str, samples: tf.Tensor, pick: Pick) -> Any:
    """What a rule gave for rows, for the chosen of the samples that the rows belong to."""
    def apart(tensor: tf.Tensor) -> tf.Tensor:
        """(rows, ...) as (samples, rows of one, ...)."""
        shape = tf.shape(tensor)
        first = [samples, shape[0] // samples] if how == "contiguous" else [shape[0] // samples, samples]
        apart = tf.reshape(tensor, tf.concat([tf.stack(first), shape[1:]], 0))
        apart = tf.ensure_shape(apart, [None, None, *tensor.shape[1:]])
        if how == "strided":
            apart = tf.transpose(apart, [1, 0, *range(2, len(apart.shape))])
        return pick(apart)

    def columns(tensor: tf.Tensor) -> tf.Tensor:
        """(rows, groups, kappa, n) as (samples, groups, columns, n)."""
        moved = tf.transpose(apart(tensor), (0, 2, 1, 3, 4))
        shape = tf.shape(moved)
        merged = tf.reshape(moved, tf.stack([shape[0], shape[1], shape[2] * shape[3], shape[4]]))
        return tf.ensure_shape(merged, [None, tensor.shape[1], None, tensor.shape[3]])

    def total(found: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {name: tf.reduce_sum(apart(value), axis=1) for name, value in found.items()}

    if isinstance(result, Factors):
        return Factors(columns(result.g), columns(result.a), total(result.rest))
    if isinstance(result, Rows):
        rows, g = columns(result.rows[:, None, :, None]), columns(result.g[:, None])
        return Rows(rows[:, 0, :, 0], g[:, 0])
    return total(result)

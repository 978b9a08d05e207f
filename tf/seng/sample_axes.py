"""Which rows of a layer's input belong to which sample of the batch.

Most layers have the samples along their first axis. Windows, or batch and time reshaped into one axis, give
a layer several rows of each sample; a layer of a time-major part has the samples along its second axis. What
is known when a layer is traced is its shape, of which the batch may be open; so the model is probed
(``probe.py``) before it is traced, and what the passes show is decided in ``hvd_ext/seng/sample_axes.py``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvd_ext.seng import Settings
from hvd_ext.seng.sample_axes import CONTIGUOUS, ROWS, STRIDED, Placement, choose_placement, is_plain, rows_of
from hvd_ext.tensorflow.seng.layer_discovery import Layer
from hvd_ext.tensorflow.seng.probe import axis_signature, batch_of, inputs_of_a_pass, two_passes
from hvd_ext.tensorflow.seng.rules import Factors, Pick, Rows


class SampleAxisTracker:
    """The batch of the pass under way, and where each layer has it."""

    def __init__(self, settings: Settings) -> None:
        given = settings.samples
        self.axis = given if isinstance(given, int) else 0
        self._said: dict[str, Placement] = dict(given) if isinstance(given, Mapping) else {}
        self._layers: list[Layer] = []
        self._told: set[Layer] = set()
        self.trouble = ""  # why the probe did not work, if so
        self._first: Any = None
        self._seen: dict[Layer, list[np.ndarray]] | None = None  # in the pass of a probe under way

    def watch_layers(self, model: keras.Model, layers: Iterable[Layer]) -> None:
        """Take the layers of a model that is built, and what ``samples=`` says of them.

        Raises:
            ValueError: it names a layer that the model does not have.
        """
        self._layers = list(layers)
        within: dict[str, list[Any]] = {}
        for one in model._flatten_layers(include_self=True):
            inside = one._flatten_layers(include_self=True)
            for name in {one.name, one.path}:
                within[name] = [*within.get(name, []), *inside]
        for name in self._said:
            if name not in within:
                raise ValueError(f"samples names the layer {name!r}, which {model.name!r} does not have; "
                                 "take the name or the path of one of its layers")
        # What is said of the smallest part holds.
        for name in sorted(self._said, key=lambda name: -len(within[name])):
            members = {id(one) for one in within[name]}
            for layer in self._layers:
                if id(layer.layer) in members:
                    layer.samples = self._said[name]
                    self._told.add(layer)

    def wrap_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The model's ``call``, during which the batch is known."""
        @functools.wraps(call)
        def known(*args: Any, **kwargs: Any) -> Any:
            before, self._first = self._first, batch_of(args, kwargs, self.axis)
            try:
                return call(*args, **kwargs)
            finally:
                self._first = before

        return known

    def current_samples(self) -> Any:
        """The samples, 0-D int32; None outside of the model's ``call``."""
        return None if self._first is None else tf.shape(self._first)[self.axis]

    @property
    def by_rows(self) -> list[Layer]:
        """Layers whose samples cannot be told apart, and nobody said that they need not be."""
        return [layer for layer in self._layers if layer.samples == ROWS and layer not in self._told]

    def record_input(self, layer: Layer, x: tf.Tensor) -> bool:
        """Take note of a layer's input; True when the pass is a probe and of no other use."""
        if self._seen is not None:
            self._seen.setdefault(layer, []).append(x.numpy())
            return True
        if layer.samples is None and self._first is not None:
            # Not called in the probe's passes, or those did not work: the shape is all there is.
            batch = self._first.shape[self.axis]
            plain = batch is not None and is_plain(x.shape, batch, self.axis)
            layer.samples = self.axis if plain else ROWS
        return False

    def run_probe(self, model: keras.Model, args: Any, kwargs: Any) -> bool:
        """Find out where each layer has its samples; whether the passes worked.

        Of layers that they do not show nothing is known.

        Args:
            args, kwargs: what the model is called with, or Keras' descriptions of it.
        """
        unknown = {layer for layer in self._layers if layer not in self._told}
        passes: list[dict[Layer, list[np.ndarray]]] = []

        def begin() -> None:
            self._seen = {}
            passes.append(self._seen)

        def plain() -> bool:
            return all(is_plain(x.shape, batch, self.axis)
                       for layer, given in passes[0].items() if layer in unknown for x in given)

        try:
            with tf.init_scope():
                args, kwargs, batch = inputs_of_a_pass(args, kwargs, self.axis)
                two_passes(model, args, kwargs, batch=batch, axis=self.axis, begin=begin, enough=plain)
        except Exception as error:  # the model's own code, with inputs it may not take: anything can come
            self.trouble = f"{type(error).__name__}: {_in_a_line(error)}"
            return False
        finally:
            self._seen = None
        for layer in unknown & set(passes[0]):
            before, after = ([axis_signature(x, batch) for x in found.get(layer, ())]
                             for found in (passes if len(passes) > 1 else ({}, {})))
            layer.samples = choose_placement([x.shape for x in passes[0][layer]], before, after, batch,
                                             self.axis)
        self.trouble = ""
        return True


def _in_a_line(error: Exception) -> str:
    """What an error says, without what Keras says of the call and the colours it says it in."""
    said = re.sub(r"\x1b\[\d*m", "", str(error)).split("Arguments received")[0]
    return " ".join(said.split())


def axis_first(tensor: tf.Tensor, axis: int) -> tf.Tensor:
    """``tensor`` with its axis number ``axis`` in front."""
    if not axis:
        return tensor
    return tf.transpose(tensor, [axis, *(k for k in range(len(tensor.shape)) if k != axis)])


@dataclass
class Grouping:
    """Which rows belong to which of so many ``samples``, 0-D int32; ``fits``: it can be so.

    ``index`` (samples, most rows of one) has -1 where a sample has fewer; None where rows are in order.
    """

    how: Placement
    samples: tf.Tensor
    fits: tf.Tensor
    index: tf.Tensor | None = None


def group_rows(how: Placement, rows: tf.Tensor, batch: tf.Tensor | None) -> Grouping:
    """How ``rows``, 0-D int32, belong to samples.

    Args:
        batch: the samples of the pass, 0-D int32, where it is of any use.
    """
    if callable(how):
        def index_now(count: np.ndarray) -> np.ndarray:
            found = rows_of(how, int(count), None)
            assert found is not None
            return found

        index = tf.ensure_shape(tf.numpy_function(index_now, [rows], tf.int64), (None, None))
        return Grouping(how, tf.shape(index)[0], tf.constant(True), index)
    if batch is None:
        return Grouping(how, rows, tf.constant(True))
    fits = tf.equal(rows % tf.maximum(batch, 1), 0)
    return Grouping(how, tf.where(fits, batch, rows), fits)


def regroup_result(result: Any, group: Grouping, pick: Pick) -> Any:
    """What a rule gave for rows, for the chosen of the samples that the rows belong to."""
    samples = group.samples

    def apart(tensor: tf.Tensor) -> tf.Tensor:
        """(rows, ...) as (samples, rows of one, ...)."""
        if group.index is not None:
            there = tf.reshape(group.index >= 0, tf.concat(
                [tf.shape(group.index), tf.ones(len(tensor.shape) - 1, tf.int32)], 0))
            rows = tf.gather(tensor, tf.maximum(group.index, 0))
            return pick(tf.where(there, rows, tf.zeros_like(rows)))
        shape = tf.shape(tensor)
        each = shape[0] // tf.maximum(samples, 1)
        first = [samples, each] if group.how == CONTIGUOUS else [each, samples]
        apart = tf.reshape(tensor, tf.concat([tf.stack(first), shape[1:]], 0))
        apart = tf.ensure_shape(apart, [None, None, *tensor.shape[1:]])
        return pick(axis_first(apart, int(group.how == STRIDED)))

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

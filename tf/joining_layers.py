"""Layers that look at the batches of all ranks, and in whose steps they are."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvd_ext.tensorflow.variables import as_tf

JOINING: weakref.WeakSet[Any] = weakref.WeakSet()  # all of them, in this process
# Those that were called, by the graph that is traced; in eager execution since the last step.
_CALLED: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
_CALLED_EAGERLY: weakref.WeakSet[Any] = weakref.WeakSet()


def note_joining(layer: Any) -> None:
    """A layer looks at the batches of all ranks, in the step that is under way or being traced."""
    _called_here().add(layer)


def find_joining(variables: Sequence[Any]) -> set[Any]:
    """The layers that look at the batches of all ranks in the step of an optimizer of ``variables``."""
    if len(JOINING) == 0:
        return set()
    called = _called_here()
    found = {*called, *find_trained_layers(variables)}
    if called is _CALLED_EAGERLY:
        called.clear()
    return found


def find_trained_layers(variables: Sequence[Any]) -> list[Any]:
    """The layers that look at the batches of all ranks and are trained by these variables."""
    mine = {id(as_tf(variable)) for variable in variables}
    return [layer for layer in list(JOINING) if layer.trainable
            and any(id(as_tf(one)) in mine for one in layer.trainable_variables)]


def _called_here() -> weakref.WeakSet[Any]:
    if tf.executing_eagerly():
        return _CALLED_EAGERLY
    graph = tf.compat.v1.get_default_graph()
    while getattr(graph, "outer_graph", None) is not None and graph.outer_graph.building_function:
        graph = graph.outer_graph
    return _CALLED.setdefault(graph, weakref.WeakSet())

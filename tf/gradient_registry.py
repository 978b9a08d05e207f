"""TensorFlow's registry of gradients, which keeps what each ``tf.custom_gradient`` refers to for good.

In a graph that is being traced, every call of a function with a custom gradient enters a gradient of its own,
and with it the whole graph stays in memory when the model is gone.
"""

from __future__ import annotations

import weakref
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops

GRADIENTS = "_hvd_ext_gradients"  # an attribute of a graph
ATTRIBUTE = "_gradient_op_type"  # of an operation: the name of its gradient in the registry


def release_with_graph(result: Any) -> Any:
    """Let the registry's entry for a custom gradient live as long as the graph that was traced.

    Args:
        result: a tensor that the function with the custom gradient returned.

    Returns:
        The same tensor.
    """
    entries = getattr(ops.gradient_registry, "_registry", None)
    if not isinstance(entries, dict) or not isinstance(result, tf.Tensor) or not hasattr(result, "graph"):
        return result
    try:
        name = result.op.get_attr(ATTRIBUTE).decode()
        entry = entries[name]
        gradient = entry["type"]
    except (ValueError, KeyError, TypeError):  # another version of TensorFlow keeps it elsewhere
        return result
    graph = result.graph
    if not hasattr(graph, GRADIENTS):
        setattr(graph, GRADIENTS, {})
    getattr(graph, GRADIENTS)[name] = gradient
    found = weakref.ref(graph)

    def forward(operation: Any, *gradients: Any) -> Any:
        return getattr(found(), GRADIENTS)[name](operation, *gradients)

    entries[name] = {**entry, "type": forward}
    weakref.finalize(graph, entries.pop, name, None).atexit = False
    return result

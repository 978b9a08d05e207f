"""``assert_replicas_equal``: whether the ranks' models are still the same bits."""

from __future__ import annotations

import re
from typing import Any

import horovod.tensorflow as horovod
import keras
import numpy as np

from hvd_ext.consistency.replicas import Summary, check_replicas, summarize_array
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.variables import as_tf, is_per_rank, name_of


def assert_replicas_equal(model: Any, *, optimizer: Any = None, statistics: bool = False,
                          process_set: Any = horovod.global_process_set) -> None:
    """Check that all ranks hold the same model, bit for bit. Every rank must call it.

    Args:
        model: a built Keras model, or a list of variables.
        optimizer: an optimizer whose variables are compared too.
        statistics: compare also weights that no gradient changes, such as the moving averages
            of batch normalization, which differ by rank unless they are synchronised.
        process_set: the ranks that take part.

    Raises:
        ReplicasDifferError: on every rank, naming the first differing tensors and their ranks.
        ValueError: the model is not built yet.
    """
    summaries = _summarize_variables(_model_weights(model, statistics))
    if optimizer is not None:
        summaries += _summarize_variables(optimizer.variables)
    check_replicas(Collectives(process_set).allgather_object(summaries, "assert_replicas_equal"))


def _model_weights(model: Any, statistics: bool) -> list[Any]:
    if not isinstance(model, keras.Layer):
        return list(model)
    if not model.built:
        raise ValueError(
            f"the model {model.name!r} has no weights yet; call it on a batch, or "
            "model.build(input_shape), before hvd.assert_replicas_equal")
    if statistics:
        return list(model.weights)
    # Weights that were made trainable, also those of layers that are frozen now.
    trained = {id(as_tf(weight)) for layer in model._flatten_layers()
               for weight in layer._trainable_variables}
    return [weight for weight in model.weights if id(as_tf(weight)) in trained]


def _summarize_variables(variables: Any) -> list[Summary]:
    """Numbered, because two layers of one name have weights of one path."""
    return [summarize_array(f"{number}.{_without_counters(name_of(variable))}",
                            np.asarray(as_tf(variable)))
            for number, variable in enumerate(variables) if not is_per_rank(variable)]


def _without_counters(name: str) -> str:
    """A path without the numbers that Keras counts per process, such as that of "dense_1"."""
    return re.sub(r"_\d+(?=[/_]|$)", "", name)

"""``save_model``: one file for all ranks, with the whole state of an optimizer that ranks share."""

from __future__ import annotations

import contextlib
from typing import Any

import horovod.tensorflow as horovod
import keras

from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.keras_hooks import distributed_part, require_tensorflow_backend
from hvd_ext.tensorflow.persistence import keras_checkpoint_layout, state_gather


def save_model(model: keras.Model, filepath: Any, *, reset_per_rank_state: bool = False,
               process_set: Any = horovod.global_process_set, **options: Any) -> None:
    """Save a model with its optimizer from rank 0. Every rank must call it; the file is there after.

    The optimizer's state is brought together from the ranks that keep it (``server="rank0"`` or
    ``"sharded"``) and written as the plain optimizer would write it: ``keras.models.load_model``
    reads the file without this package, ``hvd.load_model`` under any ``server=`` and on any number
    of ranks. ``model.save`` writes what one rank keeps. Gradients that Keras has accumulated
    (``gradient_accumulation_steps``) are saved as their mean over the ranks.

    Args:
        model: a Keras model.
        filepath: what ``model.save`` takes; used on rank 0.
        reset_per_rank_state: leave out what belongs to each rank (TopK's residuals, MeanSquare);
            it then starts anew when the file is loaded.
        process_set: the ranks that train the model, where its optimizer is not distributed.
        options: further arguments of ``model.save``.

    Raises:
        ValueError: on every rank, where the optimizer keeps state that belongs to each rank.
        RuntimeError: on the other ranks, when rank 0 could not write the file.
    """
    require_tensorflow_backend("hvd.save_model")
    optimizer = distributed_part(getattr(model, "optimizer", None))
    collectives, saving = Collectives(process_set), contextlib.nullcontext()
    if optimizer is not None:
        collectives = Collectives(optimizer._hvd_ext.collectives.process_set)
    collectives.refuse_outside("hvd.save_model")
    if optimizer is not None:
        values = state_gather.gather_values(optimizer, reset_per_rank_state=reset_per_rank_state)
        saving = keras_checkpoint_layout.saving_values(optimizer, values)
    failure = None
    exact = contextlib.nullcontext() if optimizer is None else optimizer.exact_weights()
    try:
        with exact, saving:
            if collectives.rank == 0:
                model.save(filepath, **options)
    except Exception as error:
        failure = error
    failures = collectives.allgather_object(failure and f"{type(failure).__name__}: {failure}",
                                        "save_model")
    if failure is not None:
        raise failure
    if failures[0]:
        raise RuntimeError(f"rank 0 could not save the model: {failures[0]}")

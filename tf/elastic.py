"""Horovod elastic for TensorFlow, with a Keras state that takes Keras 3 models."""

from __future__ import annotations

from typing import Any

from horovod.common.elastic import ObjectState
from horovod.tensorflow.elastic import *  # noqa: F403
from horovod.tensorflow.elastic import TensorFlowState, run
from horovod.tensorflow.functions import broadcast_object
from horovod.tensorflow.mpi_ops import rank

from hvd_ext import aliases
from hvd_ext.tensorflow.variables import as_tf, broadcast_variables

__all__ = ["TensorFlowKerasState", "TensorFlowState", "run"]


class TensorFlowKerasState(ObjectState):
    """A Keras model, its optimizer and further attributes, committed and restored together.

    Args:
        model: a built Keras model.
        optimizer: its optimizer, when the model is not compiled with one.
        backend: ignored; in Horovod's signature for TensorFlow 1.
        kwargs: further attributes to keep, such as ``batch=0, epoch=0``.

    Raises:
        ValueError: the model is not built, or there is no optimizer.
    """

    def __init__(self, model: Any, optimizer: Any = None, backend: Any = None,
                 **kwargs: Any) -> None:
        del backend
        if not model.built:
            raise ValueError(f"the model {model.name!r} must be built first: call it on a batch, "
                             "or model.build(input_shape)")
        self.model = model
        self.optimizer = optimizer or model.optimizer
        if self.optimizer is None:
            raise ValueError("give optimizer=, or compile the model first")
        if not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        self._saved: list[Any] = []
        self._save_model()
        super().__init__(bcast_object=broadcast_object, get_rank=rank, **kwargs)

    def save(self) -> None:
        self._save_model()
        super().save()

    def restore(self) -> None:
        for variable, value in zip(self._variables(), self._saved, strict=True):
            variable.assign(value)
        super().restore()

    def sync(self) -> None:
        broadcast_variables(self._variables(), root_rank=0)
        self._save_model()
        super().sync()

    def _variables(self) -> list[Any]:
        return [as_tf(one) for one in [*self.model.variables, *self.optimizer.variables]]

    def _save_model(self) -> None:
        self._saved = [variable.numpy() for variable in self._variables()]


__getattr__ = aliases.names_of(__name__, "horovod.tensorflow.elastic")

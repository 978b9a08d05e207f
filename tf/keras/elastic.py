"""Horovod elastic for Keras, with a state that takes Keras 3 models."""

from horovod.tensorflow.keras.elastic import (
    CommitStateCallback,
    UpdateBatchStateCallback,
    UpdateEpochStateCallback,
)

from hvd_ext.horovod_api import aliases
from hvd_ext.tensorflow.elastic import TensorFlowKerasState as KerasState
from hvd_ext.tensorflow.elastic import run

__all__ = ["CommitStateCallback", "KerasState", "UpdateBatchStateCallback",
           "UpdateEpochStateCallback", "run"]


__getattr__ = aliases.module_getattr(__name__, "horovod.tensorflow.keras.elastic")

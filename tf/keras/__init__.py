"""Horovod for Keras 3 with more: ``import hvd_ext.tensorflow.keras as hvd``.

Everything public in ``horovod.tensorflow.keras`` is here under its own name; what this package
adds or extends comes after it.
"""

# ruff: noqa: F401  (names are given on)

import importlib

import horovod.tensorflow.keras as _horovod
from horovod.tensorflow.keras import *  # noqa: F403

from hvd_ext import aliases
from hvd_ext.checkpoints import DamagedCheckpointError
from hvd_ext.delay import DelayCompensated, Late
from hvd_ext.replicas import ReplicasDifferError
from hvd_ext.run_checkpoints import CheckpointNotWrittenError
from hvd_ext.servers import Server
from hvd_ext.tensorflow.amsgrad import AMSGrad
from hvd_ext.tensorflow.checkpoints import load_checkpoint, save_checkpoint
from hvd_ext.tensorflow.compression import Compression
from hvd_ext.tensorflow.keras.load import load_model
from hvd_ext.tensorflow.keras.save import save_model
from hvd_ext.tensorflow.keras_hooks import require_tensorflow_backend as _require_tensorflow_backend
from hvd_ext.tensorflow.muon import Muon
from hvd_ext.tensorflow.narrow import widened
from hvd_ext.tensorflow.optimizer import KerasDistributedOptimizer as DistributedOptimizer
from hvd_ext.tensorflow.optimizer import PartialDistributedOptimizer
from hvd_ext.tensorflow.reducers import register_reducer
from hvd_ext.tensorflow.replicas import assert_replicas_equal
from hvd_ext.tensorflow.seng import SENG
from hvd_ext.tensorflow.seng.rules import register_seng_rule
from hvd_ext.tensorflow.sync_batch_norm import SyncBatchNormalization, convert_sync_batchnorm
from hvd_ext.tensorflow.uneven_data import join, uneven
from hvd_ext.tensorflow.variables import broadcast_variables
from hvd_ext.tensorflow.waiting import shutdown

_require_tensorflow_backend("hvd_ext.tensorflow.keras")
__getattr__ = aliases.names_of(__name__, "horovod.tensorflow.keras")

allreduce = widened(_horovod.allreduce)
allgather = widened(_horovod.allgather)
broadcast = widened(_horovod.broadcast)
reducescatter = widened(_horovod.reducescatter)

# Horovod's modules of these names are here already; an import from this package would find them.
callbacks = importlib.import_module("hvd_ext.tensorflow.keras.callbacks")
elastic = importlib.import_module("hvd_ext.tensorflow.keras.elastic")

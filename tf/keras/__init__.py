"""Horovod for Keras 3 with more: ``import hvd_ext.tensorflow.keras as hvd``.

Everything public in ``horovod.tensorflow.keras`` is here under its own name; what this package
adds or extends comes after it.
"""

# ruff: noqa: F401  (names are given on)

import importlib

import horovod.tensorflow.keras as _horovod
from horovod.tensorflow.keras import *  # noqa: F403

from hvd_ext.checkpoint.files import DamagedCheckpointError
from hvd_ext.checkpoint.protocol import CheckpointNotWrittenError
from hvd_ext.consistency.replicas import ReplicasDifferError
from hvd_ext.horovod_api import aliases
from hvd_ext.reducers.delay_compensation import DelayCompensated, DelayedUpdate
from hvd_ext.sharding import Server
from hvd_ext.tensorflow.amsgrad import AMSGrad
from hvd_ext.tensorflow.bfloat16_ops import via_float32
from hvd_ext.tensorflow.compression import Compression
from hvd_ext.tensorflow.consistency.replicas import assert_replicas_equal
from hvd_ext.tensorflow.graph_watchdog import shutdown
from hvd_ext.tensorflow.keras.load import load_model
from hvd_ext.tensorflow.keras.save import save_model
from hvd_ext.tensorflow.keras_hooks import require_tensorflow_backend as _require_tensorflow_backend
from hvd_ext.tensorflow.muon import Muon
from hvd_ext.tensorflow.optimizer import KerasDistributedOptimizer as DistributedOptimizer
from hvd_ext.tensorflow.optimizer import PartialDistributedOptimizer
from hvd_ext.tensorflow.persistence.checkpoint import load_checkpoint, save_checkpoint
from hvd_ext.tensorflow.reducers import register_reducer
from hvd_ext.tensorflow.seng import SENG
from hvd_ext.tensorflow.seng.rules import register_seng_rule
from hvd_ext.tensorflow.sync_batch_norm import SyncBatchNormalization, convert_sync_batchnorm
from hvd_ext.tensorflow.uneven_data import join, uneven_inputs
from hvd_ext.tensorflow.variables import broadcast_variables

_require_tensorflow_backend("hvd_ext.tensorflow.keras")
__getattr__ = aliases.module_getattr(__name__, "horovod.tensorflow.keras")

allreduce = via_float32(_horovod.allreduce)
allgather = via_float32(_horovod.allgather)
broadcast = via_float32(_horovod.broadcast)
reducescatter = via_float32(_horovod.reducescatter)

# Horovod's modules of these names are here already; an import from this package would find them.
callbacks = importlib.import_module("hvd_ext.tensorflow.keras.callbacks")
elastic = importlib.import_module("hvd_ext.tensorflow.keras.elastic")

"""Horovod for TensorFlow with more: ``import hvd_ext.tensorflow as hvd``.

Everything public in ``horovod.tensorflow`` is here under its own name; what this package adds or
extends comes after it.
"""

# ruff: noqa: E402, F401  (names are given on; TensorFlow must not be imported before the check)

import importlib

from hvd_ext.horovod_api.keras_choice import refuse_legacy_keras as _refuse_legacy_keras
from hvd_ext.horovod_api.keras_choice import refuse_missing_backend as _refuse_missing_backend

_refuse_legacy_keras()
_refuse_missing_backend()

import horovod.tensorflow as _horovod
from horovod.tensorflow import *  # noqa: F403

from hvd_ext.checkpoint.files import DamagedCheckpointError
from hvd_ext.checkpoint.protocol import CheckpointNotWrittenError
from hvd_ext.cli import openmpi
from hvd_ext.consistency.replicas import ReplicasDifferError
from hvd_ext.horovod_api import aliases
from hvd_ext.reducers.delay_compensation import DelayCompensated, DelayedUpdate
from hvd_ext.reducers.delay_compensation.momentum import AutoMomentum, momentum_for_delay
from hvd_ext.sharding import Server
from hvd_ext.tensorflow.amsgrad import AMSGrad
from hvd_ext.tensorflow.async_ps import ParameterServer
from hvd_ext.tensorflow.bfloat16_ops import via_float32
from hvd_ext.tensorflow.compression import Compression
from hvd_ext.tensorflow.consistency.replicas import assert_replicas_equal
from hvd_ext.tensorflow.functions import allgather_object, broadcast_object
from hvd_ext.tensorflow.graph_watchdog import shutdown
from hvd_ext.tensorflow.keras2 import install_keras2 as _install_keras2
from hvd_ext.tensorflow.muon import Muon
from hvd_ext.tensorflow.optimizer import DistributedOptimizer
from hvd_ext.tensorflow.persistence.checkpoint import load_checkpoint, save_checkpoint
from hvd_ext.tensorflow.reducers import register_reducer
from hvd_ext.tensorflow.seng import SENG
from hvd_ext.tensorflow.seng.rules import register_seng_rule
from hvd_ext.tensorflow.session_hook import BroadcastGlobalVariablesHook
from hvd_ext.tensorflow.sync_batch_norm import SyncBatchNormalization, convert_sync_batchnorm
from hvd_ext.tensorflow.tape import distributed_tape as DistributedGradientTape
from hvd_ext.tensorflow.tape import partial_distributed_tape as PartialDistributedGradientTape
from hvd_ext.tensorflow.uneven_data import join, uneven_inputs
from hvd_ext.tensorflow.variables import broadcast_variables

openmpi.set_opal_prefix()
__getattr__ = aliases.alias_package(__name__, "horovod.tensorflow")
_install_keras2()

allreduce = via_float32(_horovod.allreduce)
grouped_allreduce = via_float32(_horovod.grouped_allreduce)
allgather = via_float32(_horovod.allgather)
grouped_allgather = via_float32(_horovod.grouped_allgather)
broadcast = via_float32(_horovod.broadcast)
alltoall = via_float32(_horovod.alltoall)
reducescatter = via_float32(_horovod.reducescatter)
grouped_reducescatter = via_float32(_horovod.grouped_reducescatter)

# Horovod's modules of these names are here already; an import from this package would find them.
elastic = importlib.import_module("hvd_ext.tensorflow.elastic")

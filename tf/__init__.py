"""Horovod for TensorFlow with more: ``import hvd_ext.tensorflow as hvd``.

Everything public in ``horovod.tensorflow`` is here under its own name; what this package adds or
extends comes after it.
"""

# ruff: noqa: E402, F401  (names are given on; TensorFlow must not be imported before the check)

import importlib

from hvd_ext.keras_choice import refuse_legacy_keras as _refuse_legacy_keras

_refuse_legacy_keras()

import horovod.tensorflow as _horovod
from horovod.tensorflow import *  # noqa: F403

from hvd_ext import aliases, openmpi
from hvd_ext.checkpoints import DamagedCheckpointError
from hvd_ext.delay import DelayCompensated, Late
from hvd_ext.delay.momentum import AutoMomentum, momentum_for_delay
from hvd_ext.replicas import ReplicasDifferError
from hvd_ext.run_checkpoints import CheckpointNotWrittenError
from hvd_ext.servers import Server
from hvd_ext.tensorflow.amsgrad import AMSGrad
from hvd_ext.tensorflow.async_ps import ParameterServer
from hvd_ext.tensorflow.checkpoints import load_checkpoint, save_checkpoint
from hvd_ext.tensorflow.compression import Compression
from hvd_ext.tensorflow.functions import allgather_object, broadcast_object
from hvd_ext.tensorflow.keras2 import install as _install_keras2
from hvd_ext.tensorflow.muon import Muon
from hvd_ext.tensorflow.narrow import widened
from hvd_ext.tensorflow.optimizer import DistributedOptimizer
from hvd_ext.tensorflow.reducers import register_reducer
from hvd_ext.tensorflow.replicas import assert_replicas_equal
from hvd_ext.tensorflow.seng import SENG
from hvd_ext.tensorflow.seng.rules import register_seng_rule
from hvd_ext.tensorflow.session_hook import BroadcastGlobalVariablesHook
from hvd_ext.tensorflow.sync_batch_norm import SyncBatchNormalization, convert_sync_batchnorm
from hvd_ext.tensorflow.tape import distributed_tape as DistributedGradientTape
from hvd_ext.tensorflow.tape import partial_distributed_tape as PartialDistributedGradientTape
from hvd_ext.tensorflow.uneven_data import join, uneven
from hvd_ext.tensorflow.variables import broadcast_variables
from hvd_ext.tensorflow.waiting import shutdown

openmpi.set_opal_prefix()
__getattr__ = aliases.offer(__name__, "horovod.tensorflow")
_install_keras2()

allreduce = widened(_horovod.allreduce)
grouped_allreduce = widened(_horovod.grouped_allreduce)
allgather = widened(_horovod.allgather)
grouped_allgather = widened(_horovod.grouped_allgather)
broadcast = widened(_horovod.broadcast)
alltoall = widened(_horovod.alltoall)
reducescatter = widened(_horovod.reducescatter)
grouped_reducescatter = widened(_horovod.grouped_reducescatter)

# Horovod's modules of these names are here already; an import from this package would find them.
elastic = importlib.import_module("hvd_ext.tensorflow.elastic")

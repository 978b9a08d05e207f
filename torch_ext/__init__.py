"""Horovod for PyTorch with more: ``import hvd_ext.torch as hvd`` in place of ``import horovod.torch as hvd``.

Everything public in ``horovod.torch`` is here under its own name; what this package adds or
extends comes after it.
"""

import importlib

from horovod.torch import *  # noqa: F403

from hvd_ext.checkpoint.files import DamagedCheckpointError
from hvd_ext.checkpoint.protocol import CheckpointNotWrittenError
from hvd_ext.cli import openmpi
from hvd_ext.consistency.replicas import ReplicasDifferError
from hvd_ext.horovod_api import aliases
from hvd_ext.reducers.delay_compensation import DelayCompensated, DelayedUpdate
from hvd_ext.reducers.delay_compensation.momentum import AutoMomentum, momentum_for_delay
from hvd_ext.reporting.tensorboard import log_report
from hvd_ext.sharding import Server
from hvd_ext.torch.amsgrad import AMSGrad
from hvd_ext.torch.async_ps import ParameterServer
from hvd_ext.torch.collectives import shutdown
from hvd_ext.torch.compression import Compression
from hvd_ext.torch.consistency.replicas import assert_replicas_equal, broadcast_parameters
from hvd_ext.torch.functions import allgather_object, broadcast_object
from hvd_ext.torch.mpi_ops import *  # noqa: F403
from hvd_ext.torch.muon import Muon
from hvd_ext.torch.optimizer import DistributedOptimizer
from hvd_ext.torch.persistence.checkpoint import load_checkpoint, save_checkpoint
from hvd_ext.torch.persistence.optimizer_broadcast import broadcast_optimizer_state
from hvd_ext.torch.reducers import register_reducer
from hvd_ext.torch.seng import SENG
from hvd_ext.torch.seng.rules import register_seng_rule
from hvd_ext.torch.sharding.clipping import clip_grad_norm_
from hvd_ext.torch.sync_batch_norm import SyncBatchNorm, convert_sync_batchnorm
from hvd_ext.torch.uneven_data import join, uneven_inputs

openmpi.set_opal_prefix()
__getattr__ = aliases.alias_package(__name__, "horovod.torch")

# Horovod's module of this name is here already; an import from this package would find it.
elastic = importlib.import_module("hvd_ext.torch.elastic")

__all__ = [
    *(name for name in dir() if not name.startswith("_")),
    "AMSGrad",
    "AutoMomentum",
    "CheckpointNotWrittenError",
    "Compression",
    "DamagedCheckpointError",
    "DelayCompensated",
    "DistributedOptimizer",
    "DelayedUpdate",
    "Muon",
    "ParameterServer",
    "ReplicasDifferError",
    "SENG",
    "Server",
    "SyncBatchNorm",
    "allgather_object",
    "assert_replicas_equal",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "clip_grad_norm_",
    "convert_sync_batchnorm",
    "join",
    "load_checkpoint",
    "log_report",
    "momentum_for_delay",
    "register_reducer",
    "register_seng_rule",
    "save_checkpoint",
    "shutdown",
    "uneven_inputs",
]

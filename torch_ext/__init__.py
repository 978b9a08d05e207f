"""Horovod for PyTorch with more: ``import hvd_ext.torch as hvd`` in place of ``import horovod.torch as hvd``.

Everything public in ``horovod.torch`` is here under its own name; what this package adds or
extends comes after it.
"""

import importlib

from horovod.torch import *  # noqa: F403

from hvd_ext import aliases, openmpi
from hvd_ext.delay import DelayCompensated
from hvd_ext.delay.momentum import AutoMomentum, momentum_for_delay
from hvd_ext.replicas import ReplicasDifferError
from hvd_ext.torch.amsgrad import AMSGrad
from hvd_ext.torch.async_ps import ParameterServer
from hvd_ext.torch.compression import Compression
from hvd_ext.torch.optimizer import DistributedOptimizer
from hvd_ext.torch.reducers import register_reducer
from hvd_ext.torch.replicas import assert_replicas_equal, broadcast_optimizer_state
from hvd_ext.torch.seng import SENG
from hvd_ext.torch.seng.rules import register_seng_rule

openmpi.set_opal_prefix()
__getattr__ = aliases.offer(__name__, "horovod.torch")

# Horovod's module of this name is here already; an import from this package would find it.
elastic = importlib.import_module("hvd_ext.torch.elastic")

__all__ = [
    *(name for name in dir() if not name.startswith("_")),
    "AMSGrad",
    "AutoMomentum",
    "Compression",
    "DelayCompensated",
    "DistributedOptimizer",
    "ParameterServer",
    "ReplicasDifferError",
    "SENG",
    "assert_replicas_equal",
    "broadcast_optimizer_state",
    "momentum_for_delay",
    "register_reducer",
    "register_seng_rule",
]

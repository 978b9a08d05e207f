"""Horovod's functions for weights, optimizers and objects.

Horovod names the collective of an object after its type, so that ``hvd.broadcast_object(x if rank == 0 else
None, 0)`` waits forever. Here it has one name on every rank.
"""

from __future__ import annotations

from horovod.torch import functions as horovods

from hvd_ext.horovod_api import aliases
from hvd_ext.horovod_api.signatures import set_default_name
from hvd_ext.torch.consistency.replicas import broadcast_parameters
from hvd_ext.torch.persistence.optimizer_broadcast import broadcast_optimizer_state

__getattr__ = aliases.module_getattr(__name__, "horovod.torch.functions")
__all__ = ["allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters"]

broadcast_object = set_default_name(horovods.broadcast_object, "broadcast_object")
allgather_object = set_default_name(horovods.allgather_object, "allgather_object")

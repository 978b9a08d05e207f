"""Horovod's functions for variables and objects.

Horovod names the collective of an object after its type, so that ``hvd.broadcast_object(x if rank == 0 else
None, 0)`` waits forever. Here it has one name on every rank.
"""

from __future__ import annotations

from horovod.tensorflow import functions as horovods

from hvd_ext.horovod_api import aliases
from hvd_ext.horovod_api.signatures import set_default_name
from hvd_ext.tensorflow.variables import broadcast_variables

__getattr__ = aliases.module_getattr(__name__, "horovod.tensorflow.functions")
__all__ = ["allgather_object", "broadcast_object", "broadcast_variables"]

broadcast_object = set_default_name(horovods.broadcast_object, "broadcast_object")
allgather_object = set_default_name(horovods.allgather_object, "allgather_object")

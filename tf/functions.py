"""Horovod's functions for variables and objects.

Horovod names the collective of an object after its type, so that ``hvd.broadcast_object(x if rank == 0 else
None, 0)`` waits forever. Here it has one name on every rank.
"""

from __future__ import annotations

from typing import Any

from horovod.tensorflow import functions as horovods

from hvd_ext import aliases
from hvd_ext.signatures import copy_signature
from hvd_ext.tensorflow.variables import broadcast_variables

__getattr__ = aliases.names_of(__name__, "horovod.tensorflow.functions")
__all__ = ["allgather_object", "broadcast_object", "broadcast_variables"]


@copy_signature(horovods.broadcast_object)
def broadcast_object(**arguments: Any) -> Any:
    """Horovod's; see its documentation."""
    return horovods.broadcast_object(**{**arguments, "name": arguments["name"] or "broadcast_object"})


@copy_signature(horovods.allgather_object)
def allgather_object(**arguments: Any) -> Any:
    """Horovod's; see its documentation."""
    return horovods.allgather_object(**{**arguments, "name": arguments["name"] or "allgather_object"})

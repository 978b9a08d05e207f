"""Horovod's collectives for users, also for bfloat16, which Horovod 0.28.1 does not know.

Reductions of bfloat16 travel as float32: the sum is taken there and rounded once, for twice the bytes.
What only moves (allgather, broadcast, alltoall) travels as the same bits under int16; as float32 where
autograd has to follow it. All other dtypes go to Horovod as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from horovod.torch import mpi_ops

from hvd_ext.horovod_api import aliases
from hvd_ext.horovod_api.signatures import copy_signature
from hvd_ext.torch.collectives import as_carrier

__getattr__ = aliases.module_getattr(__name__, "horovod.torch.mpi_ops")

Finish = Callable[[Any], Any]
_FINISH: dict[Any, Finish] = {}  # by handle: what makes Horovod's answer the caller's


def _for_bfloat16(name: str) -> Callable[..., Any]:
    """Horovod's function ``name``, with its signature, taking bfloat16 too."""
    horovods = getattr(mpi_ops, name)
    first = next(iter(inspect.signature(horovods).parameters))
    moves = any(kind in name for kind in ("allgather", "broadcast", "alltoall"))
    grouped, later, in_place = name.startswith("grouped"), "async" in name, name.endswith("_")

    @copy_signature(horovods)
    def call(**arguments: Any) -> Any:
        given = arguments[first]
        tensors: Sequence[torch.Tensor] = given if grouped else [given]
        if not any(_is_bfloat16(tensor) for tensor in tensors):
            return horovods(**arguments)
        sent = [_to_send(tensor, moves, in_place or later) for tensor in tensors]
        answer = horovods(**{**arguments, first: sent if grouped else sent[0]})

        def finish(answer: Any) -> Any:
            if grouped:
                return type(answer)(_to_bfloat16(*pair, in_place)
                                    for pair in zip(answer, tensors, strict=True))
            if isinstance(answer, tuple):  # alltoall: and how much each rank has sent
                return (_to_bfloat16(answer[0], tensors[0], in_place), *answer[1:])
            return _to_bfloat16(answer, tensors[0], in_place)

        if not later:
            return finish(answer)
        _FINISH[answer] = finish
        return answer

    call.__module__ = __name__
    return call


def _is_bfloat16(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bfloat16


def _to_send(tensor: torch.Tensor, moves: bool, detached: bool) -> torch.Tensor:
    """What travels in the tensor's place."""
    if not _is_bfloat16(tensor):
        return tensor
    if moves and (detached or not (tensor.requires_grad and torch.is_grad_enabled())):
        return as_carrier(tensor.detach())
    return tensor.detach().float() if detached else tensor.float()


def _to_bfloat16(answer: torch.Tensor, given: torch.Tensor, in_place: bool) -> torch.Tensor:
    """Horovod's answer as bfloat16; in the given tensor, where that was asked for."""
    if not _is_bfloat16(given):
        return answer
    if not in_place:
        return answer.view(given.dtype) if answer.dtype == torch.int16 else answer.to(given.dtype)
    if answer.dtype != torch.int16:  # int16 is the given tensor's own memory
        with torch.no_grad():
            given.copy_(answer)
    return given


def synchronize(handle: Any) -> Any:
    """Horovod's: wait for an asynchronous collective and return its result.

    Raises:
        HorovodInternalError: it failed.
    """
    finish = _FINISH.pop(handle, None)
    answer = mpi_ops.synchronize(handle)
    return answer if finish is None else finish(answer)


def sparse_allreduce_async(tensor: torch.Tensor, name: str, op: Any,
                           process_set: Any = mpi_ops.global_process_set) -> Callable[[], torch.Tensor]:
    """Horovod's, for bfloat16 too: its values travel as float32."""
    if not _is_bfloat16(tensor):
        return mpi_ops.sparse_allreduce_async(tensor, name, op, process_set)  # type: ignore[no-any-return]
    handle = mpi_ops.sparse_allreduce_async(tensor.float(), name, op, process_set)
    return lambda: handle().to(tensor.dtype)


allreduce = _for_bfloat16("allreduce")
allreduce_ = _for_bfloat16("allreduce_")
allreduce_async = _for_bfloat16("allreduce_async")
allreduce_async_ = _for_bfloat16("allreduce_async_")
grouped_allreduce = _for_bfloat16("grouped_allreduce")
grouped_allreduce_ = _for_bfloat16("grouped_allreduce_")
grouped_allreduce_async = _for_bfloat16("grouped_allreduce_async")
grouped_allreduce_async_ = _for_bfloat16("grouped_allreduce_async_")
reducescatter = _for_bfloat16("reducescatter")
reducescatter_async = _for_bfloat16("reducescatter_async")
grouped_reducescatter = _for_bfloat16("grouped_reducescatter")
grouped_reducescatter_async = _for_bfloat16("grouped_reducescatter_async")
allgather = _for_bfloat16("allgather")
allgather_async = _for_bfloat16("allgather_async")
grouped_allgather = _for_bfloat16("grouped_allgather")
grouped_allgather_async = _for_bfloat16("grouped_allgather_async")
broadcast = _for_bfloat16("broadcast")
broadcast_ = _for_bfloat16("broadcast_")
broadcast_async = _for_bfloat16("broadcast_async")
broadcast_async_ = _for_bfloat16("broadcast_async_")
alltoall = _for_bfloat16("alltoall")
alltoall_async = _for_bfloat16("alltoall_async")

__all__ = [name for name in dir() if callable(getattr(mpi_ops, name, None)) and not name.startswith("_")]

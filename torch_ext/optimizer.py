"""``DistributedOptimizer``: Horovod's own, or the wrapped optimizer with the extensions in its step.

Arguments are decided here; ``wrapper.py`` is the optimizer itself.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable
from typing import Any

import horovod.torch as horovod
import torch

from hvd_ext import composition
from hvd_ext.buckets import check_groups
from hvd_ext.delay.config import DelayCompensated
from hvd_ext.topk import TopK
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.reducers.base import PlainReducer, Reducer
from hvd_ext.torch.reducers.delay import DelayReducer
from hvd_ext.torch.reducers.topk import TopKReducer
from hvd_ext.torch.server import make_server
from hvd_ext.torch.wrapper import extend

_OPTIMIZERS = itertools.count()


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: Any = horovod.Compression.none,
    backward_passes_per_step: int = 1,
    op: Any = horovod.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: Any = horovod.global_process_set,
    *,
    preconditioner: Any = None,
    server: str | None = None,
    grad_scaler: Any = None,
) -> Any:
    """Wrap an optimizer so that gradients are reduced over the ranks before its update.

    The positional arguments are Horovod's, with Horovod's meaning; without any extension the
    result is Horovod's own optimizer. With one it is an instance of the wrapped optimizer's class
    that shares its parameter groups and state.

    Args:
        optimizer: the optimizer to wrap.
        named_parameters: names for the parameters, usually ``model.named_parameters()``.
        compression: ``Compression.none``, ``.fp16``, or ``.topk(...)``.
        backward_passes_per_step: backward passes before ``step()``; divide the loss by it.
        op: ``Average``, ``Sum``, ``Adasum``, or ``DelayCompensated(...)``.
        gradient_predivide_factor, num_groups, groups, sparse_as_dense, process_set: Horovod's.
            With buckets (DelayCompensated, TopK) ``groups`` says which gradients share one.
        preconditioner: ``SENG(...)``: what the reduced gradient is turned into.
        server: where the update runs: "replicated", "rank0" or "sharded".
        grad_scaler: the ``torch.amp.GradScaler`` in use, so that extensions which are not linear
            in the gradient can undo its scale.

    Raises:
        ValueError: an argument is outside its limits, or extensions do not go together.
        NotImplementedError: the extension has not arrived yet.
    """
    delay = isinstance(op, DelayCompensated)
    topk = isinstance(compression, TopK)
    if hasattr(optimizer, "_hvd_reducer") or "horovod" in type(optimizer).__module__:
        raise ValueError("the optimizer is a DistributedOptimizer already; wrap it once")
    if not (delay or topk or preconditioner is not None or server is not None):
        return horovod.DistributedOptimizer(
            optimizer, named_parameters, compression, backward_passes_per_step, op,
            gradient_predivide_factor, num_groups, groups, sparse_as_dense, process_set,
        )
    if num_groups:
        warnings.warn("num_groups has been replaced by groups", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be > 0")
    check_groups(groups, member=torch.Tensor, what="torch.Tensor")
    composition.check(
        op=op if delay else None, compression=compression if topk else None,
        op_name=_op_name(op), predivide=gradient_predivide_factor, server=server,
        multiple_evaluations=isinstance(optimizer, torch.optim.LBFGS),
    )
    collectives = Collectives(process_set)
    suffix = _number_suffix(next(_OPTIMIZERS))
    common = {"groups": groups, "sparse_as_dense": sparse_as_dense}
    reducer: Reducer
    if delay:
        wire = torch.float16 if compression is horovod.Compression.fp16 else None
        reducer = DelayReducer(collectives, backward_passes_per_step, op, label=f"delay{suffix}",
                               wire_dtype=wire, scaler=grad_scaler, **common)
    elif topk:
        reducer = TopKReducer(collectives, backward_passes_per_step, compression,
                              label=f"topk{suffix}", scaler=grad_scaler, **common)
    else:
        reducer = PlainReducer(collectives, backward_passes_per_step, op=op,
                               compression=compression,
                               gradient_predivide_factor=gradient_predivide_factor, **common)
    placed = None if server is None else make_server(server)
    return extend(optimizer, named_parameters, reducer, preconditioner, placed, grad_scaler)


def _op_name(op: Any) -> str:
    if isinstance(op, DelayCompensated) or op == horovod.Average:
        return "Average"
    return "Adasum" if op == horovod.Adasum else str(op)


def _number_suffix(number: int) -> str:
    """Names of collectives differ between optimizers; the first one's are the plain ones."""
    return f".{number}" if number else ""

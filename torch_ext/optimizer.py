"""``DistributedOptimizer``: Horovod's own, or the wrapped optimizer with the extensions in its step.

Arguments are decided here; ``step.py`` is the optimizer itself.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import horovod.torch as horovod
import torch
from horovod.torch.optimizer import DistributedOptimizer as HorovodOptimizer

from hvd_ext.consistency.scopes import Scope, open_scope
from hvd_ext.horovod_api import aliases
from hvd_ext.horovod_api.signatures import refuse_old_names
from hvd_ext.reducers import registry
from hvd_ext.reducers.delay_compensation import DelayedUpdate
from hvd_ext.reducers.delayed_update import check_overlap
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.reducers.parameter_names import checked_names
from hvd_ext.sharding import Server
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.compression import WideCompressor
from hvd_ext.torch.consistency import handshake
from hvd_ext.torch.distributed_optimizer_class import extend_optimizer
from hvd_ext.torch.loss_scale import loss_scale
from hvd_ext.torch.persistence.pickling import copy_as_wrapped
from hvd_ext.torch.reducers import REDUCERS, make_reducer
from hvd_ext.torch.sharding.separability import check_separable
from hvd_ext.torch.sharding.updater import make_server

__getattr__ = aliases.module_getattr(__name__, "horovod.torch.optimizer")


@refuse_old_names(late="overlap=hvd.DelayedUpdate(...)")
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
    server: str | Server | None = None,
    grad_scaler: Any = None,
    overlap: DelayedUpdate | None = None,
    broadcast_weights: bool = False,
) -> Any:
    """Wrap an optimizer so that gradients are reduced over the ranks before its update.

    The positional arguments are Horovod's, with Horovod's meaning. The result is an instance of the
    wrapped optimizer's class that shares its parameter groups and state; with ``op=Adasum`` or LBFGS
    and no extension it is Horovod's own.

    Args:
        optimizer: the optimizer to wrap.
        named_parameters: names for the parameters, usually ``model.named_parameters()``.
        compression: ``Compression.none``, ``.fp16``, or a registered one such as ``.topk(...)``.
        backward_passes_per_step: backward passes before ``step()``; divide the loss by it.
        op: ``Average``, ``Sum``, ``Adasum``, or ``DelayCompensated(...)``.
        gradient_predivide_factor: Horovod's: divide by it before the sum, multiply after it.
        num_groups: Horovod's: the number of groups of gradients that are reduced together.
        groups: Horovod's: the number of groups, or the parameters of each. With DelayCompensated and
            compression with error feedback it says which gradients share a bucket.
        sparse_as_dense: Horovod's: reduce sparse gradients as dense ones.
        process_set: Horovod's: the ranks that train together.
        preconditioner: ``SENG(...)``: what the reduced gradient is turned into.
        server: where the update runs: "replicated", "rank0" or "sharded"; ``Server("sharded", downlink=...)``
            where the new weights are to come back compressed.
        grad_scaler: the ``torch.amp.GradScaler`` in use, so that extensions which are not linear
            in the gradient can undo its scale.
        overlap: ``DelayedUpdate(...)``: exchange gradients beside the next step's compute and apply them
            then. The first ``step()`` changes nothing; after the last one call ``flush()``.
        broadcast_weights: bring the parameters of the process set's first rank to all of it, now. A
            collective: every rank must make the optimizer. Buffers, such as the statistics of batch
            normalization, are not among them. Without it all ranks must begin with the same weights.

    Raises:
        RuntimeError: ``broadcast_weights`` under Horovod elastic.
        TypeError: ``overlap`` is something else.
        ValueError: an argument is outside its limits, extensions cannot be combined, or the optimizer cannot
            be used with ``server``.
    """
    if hasattr(optimizer, "_hvd_ext") or "horovod" in type(optimizer).__module__:
        raise ValueError("the optimizer is a DistributedOptimizer already; wrap it once")
    method = registry.method_of(REDUCERS, op, compression)
    check_overlap(overlap, preconditioner=preconditioner,
               passes_apart=getattr(method, "virtual_workers", "rank") != "rank",
               multiple_evaluations=isinstance(optimizer, torch.optim.LBFGS))
    names = checked_names(optimizer.param_groups, named_parameters)
    collectives = Collectives(process_set, _make_scope(optimizer, names, process_set))
    if broadcast_weights:
        handshake.broadcast_weights(collectives, *_name_parameters(optimizer, names))
    alone = method is None and preconditioner is None and server is None and overlap is None
    if alone and (op == horovod.Adasum or isinstance(optimizer, torch.optim.LBFGS)):
        if compression is horovod.Compression.none:
            compression = WideCompressor
        return copy_as_wrapped(HorovodOptimizer(
            optimizer, [(name, p) for p, name in names.items()] or None, compression,
            backward_passes_per_step, op, gradient_predivide_factor, num_groups, groups,
            sparse_as_dense, process_set,
        ))
    if num_groups:
        warnings.warn("num_groups has been replaced by groups", DeprecationWarning, stacklevel=3)
        groups = num_groups if groups is None else groups
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be > 0")
    options = ReductionOptions(
        prefix="" if method is None else method.label,
        passes=backward_passes_per_step, half=compression is horovod.Compression.fp16,
        groups=groups, sparse_as_dense=sparse_as_dense,
        sparse_only=isinstance(optimizer, torch.optim.SparseAdam),
        loss_scale=functools.partial(loss_scale, grad_scaler),
    )
    placed = None if server is None else make_server(server)
    where = None if placed is None else placed.where
    reducer = make_reducer(
        collectives, options, op=op, compression=compression,
        predivide=gradient_predivide_factor, server=where,
        multiple_evaluations=isinstance(optimizer, torch.optim.LBFGS),
        owners=placed if where == "sharded" and preconditioner is None else None, overlap=overlap,
    )
    if placed is not None:
        check_separable(optimizer, placed.settings)
    return extend_optimizer(optimizer, names, reducer, preconditioner, placed, grad_scaler)


def _name_parameters(optimizer: torch.optim.Optimizer, names: dict[Any, str]) -> tuple[list[str],
                                                                                       list[torch.Tensor]]:
    """The optimizer's parameters, and a name for each."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [names.get(p, str(number)) for number, p in enumerate(parameters)], parameters


def _make_scope(optimizer: torch.optim.Optimizer, names: dict[Any, str], process_set: Any) -> Scope:
    """The part of its collectives' names that belongs to the optimizer."""
    named, parameters = _name_parameters(optimizer, names)
    lines = [(name, tuple(p.shape), str(p.dtype)) for name, p in zip(named, parameters, strict=True)]
    return open_scope(process_set.process_set_id, lines, parameters)

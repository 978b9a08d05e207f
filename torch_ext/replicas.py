"""Replicas: one rank's optimizer state brought to all, and whether all models are the same bits."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from horovod.torch import functions

from hvd_ext.replicas import Summary, check_replicas, summarize
from hvd_ext.torch.collectives import Collectives, carrier


def broadcast_parameters(params: Any, root_rank: int) -> None:
    """Horovod's function, for weights of any layout (``channels_last``), bfloat16 and bool too.

    A tensor that is not contiguous travels as a contiguous copy; layouts may differ between ranks.

    Args:
        params: ``model.state_dict()``, ``model.named_parameters()``, ``model.parameters()``, a list of
            tensors or of (name, tensor).
        root_rank: the rank whose tensors all get.

    Raises:
        ValueError: ``params`` is something else.
    """
    if isinstance(params, dict):
        params = sorted(params.items())
    elif isinstance(params, (list, Iterator)):
        params = [one if isinstance(one, tuple) else (None, one) for one in params]
    else:
        raise ValueError(f"params must be a state_dict, a list or named_parameters(), got {type(params)}")
    copies, sent = [], []
    for name, tensor in params:
        whole = tensor
        if not tensor.is_contiguous():
            whole = tensor.detach().contiguous()
            copies.append((tensor, whole))
        sent.append((name, carrier(whole.detach())))
    functions.broadcast_parameters(sent, root_rank)
    with torch.no_grad():
        for tensor, whole in copies:
            tensor.copy_(whole)


# Horovod's function with ours in place of its broadcast of tensors: moments have the weights' layout.
_broadcast_state = types.FunctionType(
    functions.broadcast_optimizer_state.__code__,
    {**vars(functions), "broadcast_parameters": broadcast_parameters}, "broadcast_optimizer_state",
    functions.broadcast_optimizer_state.__defaults__)


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int,
                              model: torch.nn.Module | None = None) -> None:
    """Horovod's function; an error where state that is kept per rank would not come along.

    With ``server="rank0"`` or ``"sharded"`` moments stay with their owners: only the parameter
    groups' settings are broadcast, and a checkpoint is to be loaded on every rank.

    A checkpoint read on one rank and broadcast brings the wrapped optimizer's state, but the
    extensions' state is each rank's own. When the ranks' differ in age, that is an error.

    Raises:
        ValueError: on every rank, when some have extension state of other steps than the root's.
    """
    wrapper = getattr(optimizer, "_hvd_ext", None)
    if wrapper is not None and wrapper.collectives.included:
        ages = wrapper.collectives.allgather_object(
            wrapper.reducer.state_dict().get("steps", 0), "hvd_ext/state_age"
        )
        if len(set(ages)) > 1:
            raise ValueError(
                f"the ranks' extension state is of different steps ({ages}, by rank); load each "
                "rank's own checkpoint before broadcasting, or load the one file on every rank "
                "with load_state_dict(state, reset_per_rank_state=True)"
            )
    server = None if wrapper is None else wrapper.server
    if server is not None and not server.alone:
        server.broadcast_settings(root_rank)
    elif optimizer is not None:
        fresh = not optimizer.state_dict()["state"]
        everyone = Collectives().allgather_object(fresh, "hvd_ext/state_is_fresh")
        with _weights_kept(optimizer, fresh and not all(everyone)):
            _broadcast_state(optimizer, root_rank, model)


@contextlib.contextmanager
def _weights_kept(optimizer: torch.optim.Optimizer, needed: bool) -> Iterator[None]:
    """Horovod makes the state of a fresh optimizer by a step with gradients of zero. Where the root has state
    already, as when only it has read a checkpoint, weight decay would move the others' weights alone."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]] if needed else []
    before = [parameter.detach().clone() for parameter in parameters]
    yield
    with torch.no_grad():
        for parameter, weight in zip(parameters, before, strict=True):
            parameter.copy_(weight)


def assert_replicas_equal(model: torch.nn.Module | Iterable[tuple[str, torch.Tensor]], *,
                          optimizer: torch.optim.Optimizer | None = None,
                          statistics: bool = False, process_set: Any = None) -> None:
    """Check that all ranks hold the same model, bit for bit. Every rank must call it.

    Args:
        model: a module, or (name, tensor) pairs such as ``model.named_parameters()``.
        optimizer: an optimizer whose tensors of state are compared too. Leave it out with an
            optimizer whose state belongs to one rank (``server="rank0"`` or ``"sharded"``).
        statistics: compare also the module's buffers, such as the running averages of batch
            normalization, which differ by rank unless they are synchronised.
        process_set: the ranks that take part; all by default.

    Raises:
        ReplicasDifferError: on every rank, naming the first differing tensors and their ranks.
        ValueError: there is no tensor to compare, or a parameter is not initialised yet.
    """
    summaries = [_summary(name, tensor) for name, tensor in _named(model, statistics)]
    if optimizer is not None:
        summaries += [_summary(name, tensor) for name, tensor in _state_tensors(optimizer)]
    if not summaries:
        raise ValueError(f"{type(model).__name__} has no tensors to compare; give a model with "
                         "parameters, or (name, tensor) pairs")
    collectives = Collectives(process_set)
    check_replicas(collectives.allgather_object(summaries, "assert_replicas_equal"))


def _named(model: Any, statistics: bool) -> Iterator[tuple[str, torch.Tensor]]:
    if not isinstance(model, torch.nn.Module):
        yield from model
        return
    for name, parameter in model.named_parameters():
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            raise ValueError(f"the parameter {name} has no shape yet; run the model on a batch "
                             "before hvd.assert_replicas_equal")
        yield name, parameter
    if statistics:
        yield from model.named_buffers()


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    number = 0
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            state: Mapping[str, Any] = optimizer.state.get(parameter, {})
            for key in sorted(state):
                if isinstance(state[key], torch.Tensor):
                    yield f"optimizer/{index}.{number}/{key}", state[key]
            number += 1


def _summary(name: str, tensor: torch.Tensor) -> Summary:
    flat = (tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()).cpu().reshape(-1)
    bits = summarize(name, flat.contiguous().view(torch.uint8).numpy())
    wide = flat.to(torch.complex128 if flat.is_complex() else torch.float64)
    return Summary(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."),
                   bits.digest, float(torch.linalg.vector_norm(wide)))

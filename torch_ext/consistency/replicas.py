"""Replicas: one rank's weights brought to all, and whether all models are the same bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from horovod.torch import functions

from hvd_ext.consistency.replicas import Summary, check_replicas, summarize_array
from hvd_ext.torch.collectives import Collectives, as_carrier


def broadcast_parameters(params: Any, root_rank: int) -> None:
    """Copy tensors from one rank to all, of any layout (``channels_last``), bfloat16 and bool too.

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
        sent.append((name, as_carrier(whole.detach())))
    functions.broadcast_parameters(sent, root_rank)
    with torch.no_grad():
        for tensor, whole in copies:
            tensor.copy_(whole)


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
    summaries = [_summarize_tensor(name, tensor) for name, tensor in _named_tensors(model, statistics)]
    if optimizer is not None:
        summaries += [_summarize_tensor(name, tensor) for name, tensor in _state_tensors(optimizer)]
    if not summaries:
        raise ValueError(f"{type(model).__name__} has no tensors to compare; give a model with "
                         "parameters, or (name, tensor) pairs")
    collectives = Collectives(process_set)
    check_replicas(collectives.allgather_object(summaries, "assert_replicas_equal"))


def _named_tensors(model: Any, statistics: bool) -> Iterator[tuple[str, torch.Tensor]]:
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


def _summarize_tensor(name: str, tensor: torch.Tensor) -> Summary:
    flat = (tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()).cpu().reshape(-1)
    bits = summarize_array(name, flat.contiguous().view(torch.uint8).numpy())
    wide = flat.to(torch.complex128 if flat.is_complex() else torch.float64)
    return Summary(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."),
                   bits.digest, float(torch.linalg.vector_norm(wide)))

"""Pieces of parameters: which optimizers take them, flat memory, state cut to a piece and joined again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hvd_ext.sharding import orthogonalising_cost
from hvd_ext.torch.amsgrad import AMSGrad
from hvd_ext.torch.muon import matrix_shape

# What these do to an element depends on nothing but that element's gradient and state, and on numbers.
ELEMENTWISE = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.Adamax, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, AMSGrad,
)

State = Mapping[str, Any]


def is_elementwise(optimizer: type) -> bool:
    """Whether the update of a class of optimizers may run on a piece of a parameter.

    A class of yours, also one derived from these, says so with the attribute ``elementwise = True``.
    """
    return optimizer in ELEMENTWISE or bool(vars(optimizer).get("elementwise", False))


def update_cost(optimizer: type, parameter: torch.Tensor) -> int:
    """What owners are balanced by: bytes; for Muon the cost of orthogonalising."""
    if issubclass(optimizer, torch.optim.Muon):
        return orthogonalising_cost(matrix_shape(parameter.shape))
    return parameter.numel() * parameter.element_size()


def flatten_view(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in row-major order, (numel,): the same memory where that is contiguous, else a copy.

    What is written into a copy counts after :func:`put_back`.
    """
    return tensor.detach().reshape(-1)


def is_still(parameter: torch.Tensor) -> bool:
    """Whether a step leaves a parameter as it is: it is frozen."""
    return not parameter.requires_grad and parameter.grad is None


def put_back(tensor: torch.Tensor, flat: torch.Tensor) -> None:
    """Write what :func:`flatten_view` gave into the tensor, where it is a copy."""
    if flat.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(flat.view(tensor.shape))


def cut_state(state: State, shape: Sequence[int], start: int, stop: int) -> dict[str, Any]:
    """The state of elements ``start`` to ``stop`` of a flattened parameter of ``shape``.

    Tensors of the parameter's shape are cut, everything else (counters) is taken as it is.
    """
    return {key: value.reshape(-1)[start:stop].clone() if _of_shape(value, shape) else value
            for key, value in state.items()}


def join_states(states: Sequence[State], shape: Sequence[int]) -> dict[str, Any]:
    """The state of a whole parameter of ``shape`` from those of its pieces, in their order."""
    first = dict(states[0])
    if len(states) == 1:
        return first
    for key, value in first.items():
        if isinstance(value, torch.Tensor) and value.dim() == 1:
            first[key] = torch.cat([state[key] for state in states]).view(tuple(shape))
    return first


def _of_shape(value: Any, shape: Sequence[int]) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and tuple(value.shape) == tuple(shape)

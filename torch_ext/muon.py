"""Muon for convolutions too: a parameter of more than two axes is orthogonalised as a matrix."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from math import prod
from typing import Any

import torch


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` that takes convolutions: their kernels are matrices of (out, in · positions).

    That is how Muon's author trains convolutions (Jordan et al. 2024, "Muon: An optimizer for hidden layers
    in neural networks"). Matrices are updated as by ``torch.optim.Muon``. Give biases, norms, embeddings and
    the last layer to another optimizer.

    Args:
        params: parameters of two axes or more, or dicts of parameter groups.
        args: further positional arguments of ``torch.optim.Muon``.
        kwargs: ``lr``, ``weight_decay``, ``momentum`` and the others of ``torch.optim.Muon``.

    Raises:
        ValueError: a parameter with fewer than two axes, or an argument outside its limits.
    """

    def __init__(self, params: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        # torch's refuses what is no matrix on construction, and not when a group is added.
        super().__init__([torch.nn.Parameter(torch.empty(0, 0))], *args, **kwargs)
        self.param_groups.clear()
        groups = list(params)
        if not groups:
            raise ValueError("Muon was given no parameters")
        for group in groups if isinstance(groups[0], dict) else [{"params": groups}]:
            self.add_param_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Raises:
            ValueError: it has a parameter with fewer than two axes.
        """
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() < 2:
                del self.param_groups[-1]
                raise ValueError(f"Muon orthogonalises matrices, got a parameter of shape "
                                 f"{tuple(parameter.shape)}; give it to another optimizer, such as AdamW")

    def _init_group(self, group: MutableMapping[str, Any], params_with_grad: list[torch.Tensor],
                    grads: list[torch.Tensor], muon_momentum_bufs: list[torch.Tensor]) -> bool:
        for parameter in group["params"]:
            state = self.state[parameter] if parameter.grad is not None else {"momentum_buffer": None}
            if "momentum_buffer" not in state:  # in the order of the weights, whatever the gradient's is
                state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        found = super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        orders = [_memory_order(parameter) for parameter in params_with_grad]
        for tensors in (params_with_grad, grads, muon_momentum_bufs):
            tensors[:] = [_as_matrix(tensor, order) for tensor, order in zip(tensors, orders, strict=True)]
        return found


def _memory_order(parameter: torch.Tensor) -> list[int]:
    """The axes behind the first in the order in which they lie in memory (channels_last: the channels last).

    In which order the columns stand makes no difference to a matrix made orthogonal.
    """
    return [0, *sorted(range(1, parameter.dim()), key=lambda axis: -parameter.stride(axis))]


def _as_matrix(tensor: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """(first axis, all others): the same memory, of a gradient that lies in another order a copy."""
    return tensor if tensor.dim() == 2 else tensor.permute(*order).flatten(1)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the matrix that a parameter is taken for."""
    return shape[0], prod(shape[1:])

"""Weights that are used through ``torch.nn.functional``, not by calling their module.

A linear layer's weight that is given to ``F.linear`` with another bias (BEiT, Swin v2), and the table of an
``Embedding`` whose own ``forward`` shifts the numbers of the rows or scales what it finds (OPT, Gemma).
While a model, or such an embedding, runs on a refresh step, these functions tell of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Told = Callable[[nn.Module, torch.Tensor, torch.Tensor], None]
"""``told(module, x, z)``: the module's weight made z of x."""


Listener = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], None]
"""``listener(x, weight, bias, z)``, called behind the function; ``bias`` is None for an embedding."""

_ORIGINALS: dict[str, Callable[..., torch.Tensor]] = {}
_LISTENERS: dict[str, list[Listener]] = {"linear": [], "embedding": []}


def patch_function(name: str, listener: Listener) -> Callable[[], None]:
    """Tell ``listener`` of each call of ``F.linear`` or ``F.embedding`` until what is returned is called.

    The function is replaced while anyone listens. Listeners may come and go in any order.
    """
    if not _LISTENERS[name]:
        _ORIGINALS[name] = getattr(F, name)
        setattr(F, name, _bind_linear if name == "linear" else _bind_embedding)
    _LISTENERS[name].append(listener)

    def stop() -> None:
        _LISTENERS[name].remove(listener)
        if not _LISTENERS[name]:
            setattr(F, name, _ORIGINALS.pop(name))

    return stop


def _bind_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    z = _ORIGINALS["linear"](input, weight, bias)
    for listener in list(_LISTENERS["linear"]):
        listener(input, weight, bias, z)
    return z


def _bind_embedding(input: torch.Tensor, weight: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
    z = _ORIGINALS["embedding"](input, weight, *more, **options)
    for listener in list(_LISTENERS["embedding"]):
        listener(input, weight, None, z)
    return z


def patch_linear(modules: Mapping[int, Sequence[nn.Linear]], told: Told) -> Callable[[], None]:
    """Tell of weights used with another bias than their module's, until what is returned is called.

    Args:
        modules: those that have a weight, by its id; the first is told of.
    """
    def listener(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, z: torch.Tensor) -> None:
        owners = modules.get(id(weight), ())
        if owners and all(bias is not module.bias for module in owners):
            told(owners[0], x, z)

    return patch_function("linear", listener)


def patch_embedding(module: nn.Embedding, told: Told) -> Callable[[], None]:
    """Tell of each look-up in the module's table, until what is returned is called."""
    def listener(x: torch.Tensor, weight: torch.Tensor, _bias: torch.Tensor | None, z: torch.Tensor) -> None:
        if weight is module.weight:
            told(module, x, z)

    return patch_function("embedding", listener)

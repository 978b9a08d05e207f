"""The autoencoder of ``seng_autoencoder`` in PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

SIZES = (64, 128, 64, 32, 8, 32, 64, 128, 64)


def autoencoder(seed: int) -> nn.Sequential:
    """The network, with PyTorch's own initial weights."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(SIZES):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def start(method: str, settings: dict[str, Any], seed: int, digits: np.ndarray,
          seng_options: dict[str, Any]) -> tuple[Callable[[np.ndarray], None], Callable[[], float]]:
    """A function that takes a step on the rows it is given, and one that gives the loss over all."""
    import hvd_ext.torch as hvd

    torch.set_num_threads(1)
    rows = torch.from_numpy(digits)
    model = autoencoder(seed)
    seng = None
    if method == "Adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"])
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=settings["lr"],
                                    momentum=settings.get("momentum", 0.9))
    if method == "SENG":
        seng = hvd.SENG(model, damping=settings["damping"], update_freq=settings["update_freq"],
                        **seng_options)

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (model(x) - x).square().sum() / x.shape[0]

    def step(picked: np.ndarray) -> None:
        optimizer.zero_grad()
        loss_of(rows[picked]).backward()
        if seng is not None:
            seng.step()
        optimizer.step()

    def loss() -> float:
        with torch.no_grad():
            return float(loss_of(rows))

    return step, loss

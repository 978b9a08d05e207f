"""A small network with batch statistics, its data, and training steps; for tests on one rank."""

from __future__ import annotations

import torch
from torch import nn

LAM = 0.25


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).to(dtype)


def batch(seed: int, rho: int = 6, dtype: torch.dtype = torch.float64):
    made = torch.Generator().manual_seed(seed)
    return (torch.randn(rho, 2, 5, 5, generator=made, dtype=torch.float64).to(dtype),
            torch.randint(0, 3, (rho,), generator=made))


def loss_of(model: nn.Module, data) -> torch.Tensor:
    return nn.functional.cross_entropy(model(data[0]), data[1])


def train(model: nn.Module, seng, optimizer, seeds, rho=lambda seed: 6) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, batch(seed, rho(seed))).backward()
        seng.step()
        optimizer.step()


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other

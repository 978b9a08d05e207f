"""What ranks run for tests/torch/test_seng_models_ranks.py; every function is called on all ranks at once."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

import hvd_ext.torch as hvd
from hvd_ext.torch.seng import SENG
from tests.torch import seng_models as models
from tests.torch.per_sample import flat_gradient
from tests.torch.seng_on_ranks import LAM, bits
from tests.torch.test_seng_embedding import Attention


def language(tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.Language(tied=tied).double()


def ids(rank: int, time: int = 4) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([rank, 1]).integers(0, 11, (3, time)))


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return model(rows).square().sum() / len(rows)


def tables(coupling: str, tied: bool, settings: dict[str, Any]) -> tuple[dict[str, np.ndarray], bytes]:
    """Directions of a language model, rows that differ from rank to rank; sequences of other lengths too."""
    model = language(tied)
    seng = hvd.SENG(model, damping=LAM, sketch=None, coupling=coupling, update_freq=2, exclude=["places"],
                    name=f"tables{coupling}{tied}{len(settings)}", **settings)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(),
        preconditioner=seng)
    loss_of(model, ids(hvd.rank())).backward()
    optimizer.synchronize()
    found = {layer.name: flat_gradient(layer).numpy() for layer in seng.layers}
    with optimizer.skip_synchronize():
        optimizer.step()
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, ids(hvd.rank() + 10 * step, 4 + hvd.rank())).backward()
        optimizer.step()
    assert seng.report()["failures"] == 0
    seng.close()
    return found, bits(model)


class Sometimes(models.Past):
    """Its weight is used past its ``forward`` on rank 1 only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more = x @ self.mixed.weight.T if hvd.rank() == 1 else 0.0
        return self.head(torch.tanh(self.mixed(x)) + more)


def refused_on_one_rank(coupling: str) -> tuple[list[str | None], list[str], bytes]:
    """Who has curvature after two refreshes, what was said, the weights."""
    torch.manual_seed(0)
    model = Sometimes().double()
    seng = hvd.SENG(model, damping=LAM, coupling=coupling, update_freq=1)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(),
        preconditioner=seng)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 4).double() + hvd.rank()).square().mean().backward()
            optimizer.step()
    rows = seng.report()["layers"]
    return [row["held"] for row in rows], [str(one.message) for one in said], bits(model)


def strict_on_all() -> str:
    """The error of rows that cannot be told apart: rank 0's batch alone shows it."""
    torch.manual_seed(0)
    model = models.Experts(experts=2).double()
    seng = SENG(model, damping=LAM, strict=True, name="strict")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(),
        preconditioner=seng)
    # Of a batch of one all rows are the one sample's, so rank 1 has nothing to refuse.
    model(torch.randn(1 if hvd.rank() else 4, 5, 4).double()).square().mean().backward()
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "no error"


def attention(coupling: str) -> tuple[list[str], bytes]:
    """Sequence-first attention with dropout on its way, trained for a few steps."""
    torch.manual_seed(0)
    model = Attention(cross=True, batch_first=False, dropout=0.1)
    seng = hvd.SENG(model, damping=LAM, update_freq=2, coupling=coupling, explicit_threshold=30)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05), named_parameters=model.named_parameters(),
        preconditioner=seng)
    torch.manual_seed(hvd.rank())
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 4)).square().mean().backward()
        optimizer.step()
    return [row["held"] for row in seng.report()["layers"]], bits(model)

"""SENG Theorem 4: a wide two-layer ReLU net with squared loss and U = J^T converges linearly."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import hvd_ext.torch as hvd


class TwoLayers(nn.Module):
    """``f(x) = a^T relu(W x) / sqrt(m)`` with the signs a fixed."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, width, bias=False)
        nn.init.normal_(self.hidden.weight)
        self.register_buffer("signs", torch.randint(0, 2, (width,)) * 2.0 - 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.hidden(x)) @ self.signs / self.signs.numel() ** 0.5


def residuals(steps: int, alpha: float, **settings) -> list[float]:
    """``‖f^k - y‖^2`` for k = 0 ... steps."""
    torch.manual_seed(0)
    n, width = 12, 2048
    model = TwoLayers(6, width).double()
    model.signs = model.signs.double()
    x = nn.functional.normalize(torch.randn(n, 6), dim=1).double()
    y = torch.randn(n).double()
    seng = hvd.SENG(model, damping=1e-9, update_freq=1, loss_reduction="sum", **settings)
    found = []
    for _ in range(steps):
        f = model(x)
        found.append(float((f - y).detach().square().sum()))
        (g,) = torch.autograd.grad(0.5 * (f - y).square().sum(), model.hidden.weight)
        # U = J^T: the curvature is that of the outputs, the gradient that of the loss.
        model(x).sum().backward()
        model.hidden.weight.grad = g
        seng.step()
        with torch.no_grad():
            # U holds J^T/sqrt(n).
            model.hidden.weight -= alpha / n * model.hidden.weight.grad
    found.append(float((model(x) - y).detach().square().sum()))
    return found


@pytest.mark.parametrize("settings", [
    {"sketch": None},
    {"sketch": "uniform", "sketch_size": 1500},
    {"sketch": "leverage", "sketch_size": 1500},
    {"sketch": None, "explicit_threshold": 0, "uc": "exact"},
    {"sketch": "uniform", "explicit_threshold": 0, "uc": "exact", "row_sketch": 500},
])
def test_linear_convergence_survives_sketching(settings):
    alpha = 0.4
    found = residuals(12, alpha, **settings)
    rates = [after / before for before, after in itertools.pairwise(found)]
    # (1 - alpha)^2 without a sketch; the theorem's zeta = 1 - alpha bounds them all.
    assert max(rates) < 1 - alpha
    if settings["sketch"] is None:
        assert max(rates) == pytest.approx((1 - alpha) ** 2, abs=0.05)
    assert found[-1] < found[0] * (1 - alpha) ** 12

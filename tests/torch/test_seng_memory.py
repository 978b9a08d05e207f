"""``memory=`` in PyTorch: what is held stays within it, and the step is that of the settings it chose."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hvd_ext.torch as hvd

SAMPLES = 48


def trained(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(),
                          nn.Linear(8 * 36, 40), nn.Tanh(), nn.Linear(40, 5)).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 3, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (SAMPLES,), generator=generator)
    seng = hvd.SENG(model, damping=0.3, **settings)
    nn.functional.cross_entropy(model(x), y).backward()
    seng.step()
    return seng, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("memory", ["8MB", "1MB", 300_000, 60_000])
@pytest.mark.parametrize("curvature_dtype", [None, "bfloat16"])
def test_what_is_held_stays_within(memory, curvature_dtype, capsys):
    seng, directions = trained(memory=memory, curvature_dtype=curvature_dtype)
    budget = {"8MB": 8_000_000, "1MB": 1_000_000}.get(memory, memory)
    assert 0.2 * min(budget, 4_000_000) < seng.report()["bytes"] <= budget
    said = capsys.readouterr().out
    assert said.count(f"memory={memory!r} is kept") == 1
    chosen = {name: getattr(seng.settings, name) for name in ("explicit_threshold", "rank", "subsample")}
    _, expected = trained(**chosen, curvature_dtype=curvature_dtype)
    assert all(torch.equal(a, b) for a, b in zip(directions, expected, strict=True))


def test_layers_that_thaw_are_fitted_in(capsys):
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 2))
    model[0].requires_grad_(False)
    seng = hvd.SENG(model, damping=0.3, memory=100_000, update_freq=1)
    alone = seng.settings.subsample
    model[0].requires_grad_(True)
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(64, 30)).square().mean().backward()
        seng.step()
    assert seng.settings.subsample < alone
    assert 0 < seng.report()["bytes"] <= 100_000
    assert capsys.readouterr().out.count("is kept") == 2


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="memory must be at least"):
        trained(memory=100)

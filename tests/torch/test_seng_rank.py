"""``rank="auto"`` in PyTorch: the columns that the damping leaves meaningful, and no more."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hvd_ext.torch as hvd
from hvd_ext.torch.seng import kernels
from tests.reference import seng as reference

RHO = 6


def problem():
    """A convolution whose inputs have few directions that matter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 6, 3, padding=1, groups=2),
                          nn.Flatten(), nn.Linear(6 * 64, 3)).double()
    smooth = torch.randn(RHO, 4, 2, 2, dtype=torch.float64)
    return model, nn.functional.interpolate(smooth, (8, 8), mode="bilinear"), torch.arange(RHO) % 3


def directions(**settings):
    model, x, y = problem()
    seng = hvd.SENG(model, explicit_threshold=0, sketch=None, uc="exact", **settings)
    nn.functional.cross_entropy(model(x), y).backward()
    g = {layer: [p.grad.clone() for p in layer.parameters] for layer in seng.layers}
    seng.step()
    return seng, [(g[layer], [p.grad for p in layer.parameters]) for layer in seng.layers]


@pytest.mark.parametrize("lam", [1e-4, 0.01, 1.0])
def test_the_rank_is_the_least_that_keeps_what_matters(lam):
    whole, exact = directions(damping=lam, rank=10**6)
    seng, cut = directions(damping=lam, rank="auto")
    ranks = []
    for layer, full, (g, p), (_, wanted) in zip(seng.layers, whole.layers, cut, exact, strict=True):
        ranks.append(seng.state.systems[layer].r)
        block = whole.state.systems[full].blocks[0]
        g_full, a_full = (factor.permute(3, 0, 2, 1).numpy() for factor in (block.g, block.a))
        assert ranks[-1] == reference.fewest_columns(g_full, a_full, lam)
        # (2 e + e^2)/(1 - 2 e - e^2) for e = 0.05, in the metric of the damped curvature.
        difference = torch.cat([(a - b).flatten() for a, b in zip(p, wanted, strict=True)])
        gradient = torch.cat([part.flatten() for part in g])
        exactly = torch.cat([part.flatten() for part in wanted])
        bound = 0.1025 / (1 - 0.1025)
        assert float(lam * difference.square().sum()) <= bound**2 * float(gradient @ exactly)
    rows = {row["layer"]: row["rank"] for row in seng.report()["layers"]}
    assert [rows[layer.name] for layer in seng.layers] == ranks
    assert ranks[0] < 32 or lam < 0.01


def test_more_damping_needs_fewer_columns():
    ranks = [[system.r for system in directions(damping=lam, rank="auto")[0].state.systems.values()]
             for lam in (1e-6, 1e-3, 1e5)]
    assert all(a >= b >= c for a, b, c in zip(*ranks, strict=True))
    assert ranks[0][0] > ranks[2][0] == 1


def test_meaningful_counts_from_the_end():
    g = torch.diag(torch.tensor([3.0, 2.0, 1.0])).expand(2, 1, 3, 3)
    a = torch.eye(3).expand(2, 1, 3, 3)
    assert [kernels.effective_rank(g, a, least) for least in (0.0, 1.9, 2.0, 10.0, 100.0)] == [3, 3, 2, 1, 1]

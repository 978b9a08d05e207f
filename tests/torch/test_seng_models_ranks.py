"""SENG on several ranks: tables, attention, and what one rank alone refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.reference import seng as reference
from tests.torch import seng_models_on_ranks as on_ranks
from tests.torch.seng_on_ranks import LAM

pytestmark = pytest.mark.distributed


def dense(tied: bool) -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
    """Each layer's U on either rank, one sample's pass after the other, and the mean gradient."""
    model = on_ranks.language(tied)
    layers = {"tokens": [model.tokens.weight], "norm": [model.norm.weight], "inner": [model.inner.weight,
              model.inner.bias], "outer": [model.outer.weight, model.outer.bias]}
    if not tied:
        layers["head"] = [model.head.weight]
    found = {}
    for name, parameters in layers.items():
        us = []
        for rank in (0, 1):
            shares = []
            for row in on_ranks.ids(rank):
                grads = torch.autograd.grad(on_ranks.loss_of(model, row[None]), parameters)
                shares.append(torch.cat([grad.flatten() for grad in grads]).numpy())
            us.append(reference.dense_u(np.stack(shares)))
        found[name] = us, np.mean([u.sum(1) / np.sqrt(u.shape[1]) for u in us], 0)
    return found


@pytest.mark.parametrize("coupling", ["block", "full"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("settings", [{}, {"explicit_threshold": 20, "rank": 100, "uc": "exact"}],
                         ids=["explicit", "implicit"])
def test_tables_on_ranks_are_the_equations(ranks, coupling, settings, tied):
    everyone = ranks(2).run(on_ranks.tables, coupling, tied, settings)
    directions, weights = everyone[0]
    assert everyone[1][1] == weights
    solve = reference.block_direction if coupling == "block" else reference.joint_direction
    for name, (us, g) in dense(tied).items():
        np.testing.assert_allclose(directions[name], solve(us, g, LAM), rtol=1e-7, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("coupling", ["block", "full"])
def test_a_layer_that_one_rank_refuses_is_refused_on_all(ranks, coupling):
    everyone = ranks(2).run(on_ranks.refused_on_one_rank, coupling)
    for held, said, weights in everyone:
        assert held == ["identity", "explicit"]
        assert len(said) == 1
        assert weights == everyone[0][2]
    assert "mixed: rank 1 refused it" in everyone[0][1][0]
    assert "mixed: its samples' gradients do not add up" in everyone[1][1][0]


def test_strict_refuses_on_all_ranks_what_one_of_them_sees(ranks):
    for said in ranks(2).run(on_ranks.strict_on_all):
        assert "rows of experts.0, experts.1 belong to which sample" in said


@pytest.mark.parametrize("coupling", ["block", "lagged", "full"])
def test_attention_keeps_replicas_the_same(ranks, coupling):
    (held, weights), other = ranks(2).run(on_ranks.attention, coupling)
    assert held == ["implicit", "explicit", "explicit", "explicit"]
    assert other == (held, weights)

"""Layers held by their factors without sketching: the definition, layers left out, resumed runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import hvd_ext.torch as hvd
from tests.reference import seng as reference
from tests.torch.per_sample import flat_gradient, held_u

LAM = 0.3


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three layers of one shape, one that is not contiguous with them, one without a bias, and a norm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(),
        nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 4)).to(dtype)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x[:, :4]).square().sum(1).mean()


def test_directions_are_the_definition_with_missing_and_transposed_gradients():
    model = network()
    seng = hvd.SENG(model, damping=LAM, sketch=None, explicit_threshold=0, uc="exact", update_freq=3)
    for step in range(3):
        model.zero_grad()
        loss_of(model, batch(step)).backward()
        if step == 2:
            model[2].bias.grad = None
            model[4].weight.grad = model[4].weight.grad.t().contiguous().t()
        g = []
        for layer in seng.layers:
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters]
            g.append(torch.cat([part.flatten() for part in parts]).numpy())
        seng.step()
        for layer, gradient in zip(seng.layers, g, strict=True):
            wanted = reference.direction(held_u(seng, layer).numpy(), gradient, LAM)
            if layer.parameters[-1].grad is None:
                wanted = wanted[:layer.parameters[0].numel()]
                np.testing.assert_allclose(layer.parameters[0].grad.flatten().numpy(), wanted, rtol=1e-7,
                                           atol=1e-10)
            else:
                np.testing.assert_allclose(flat_gradient(layer).numpy(), wanted, rtol=1e-7, atol=1e-10)
    assert model[2].bias.grad is None


def test_a_layer_that_is_not_finite_leaves_the_others_refreshed():
    model = network()
    seng = hvd.SENG(model, damping=LAM, sketch=None, explicit_threshold=0, uc="exact", update_freq=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    spoil = False

    def poison(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if spoil:
            output.register_hook(lambda g: g * float("inf"))

    for step in range(4):
        optimizer.zero_grad()
        spoil = step == 2
        handle = model[7].register_forward_hook(poison)
        loss_of(model, batch(step)).backward()
        handle.remove()
        for p in model.parameters():
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
        if spoil:
            with pytest.warns(UserWarning, match="not finite"):
                seng.step()
        else:
            seng.step()
        optimizer.step()
        ages = {row["layer"]: row["age"] for row in seng.report()["layers"]}
        assert (ages["7"], ages["9"]) == (1, 1)  # the backward pass reaches them before the poison
        assert ages["0"] == ages["4"] == (2 if spoil else 1)


@pytest.mark.parametrize("settings", [{"uc": "exact"}, {"coupling": "lagged"}, {"subsample": 3},
                                      {"stale_curvature": "rescale"}])
@pytest.mark.parametrize("steps", [2, 3])
def test_a_resumed_run_is_the_same_bit_for_bit(settings, steps):
    def made():
        model = network(torch.float32)
        seng = hvd.SENG(model, damping=LAM, sketch=None, explicit_threshold=0, update_freq=3, **settings)
        return model, seng, torch.optim.SGD(model.parameters(), lr=0.05)

    def go(model, seng, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            loss_of(model, batch(seed, torch.float32)).backward()
            seng.step()
            optimizer.step()

    first, second = made(), made()
    go(*first, range(steps))
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    go(*first, range(10, 15))
    go(*second, range(10, 15))
    for one, other in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_parameters_are_found_again_when_modules_change():
    model = network()
    known = hvd.SENG(model, damping=LAM)._parameters
    assert list(map(id, known.current_parameters())) == list(map(id, model.parameters()))
    model[3] = nn.PReLU()
    model[5].register_parameter("more", nn.Parameter(torch.ones(2)))
    assert list(map(id, known.current_parameters())) == list(map(id, model.parameters()))
    model[0].weight = nn.Parameter(torch.ones(4, 5))
    assert list(map(id, known.current_parameters())) == list(map(id, model.parameters()))
    del model[9]
    assert list(map(id, known.current_parameters())) == list(map(id, model.parameters()))

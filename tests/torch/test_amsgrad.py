"""AMSGrad against the oracle, its options, its errors, its state."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hvd_ext.torch.amsgrad import AMSGrad
from tests.reference.spars_ams import amsgrad_step


def run(parameters, steps, **options):
    generator = torch.Generator().manual_seed(0)
    optimizer = AMSGrad(parameters, **options)
    gradients = []
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.empty_like(p).copy_(  # which keeps the layout
                torch.randn(p.shape, generator=generator, dtype=torch.float64))
        gradients.append([p.grad.double().numpy().copy() for p in parameters])
        optimizer.step()
    return optimizer, gradients


def parameters_of(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
            for shape in ((7, 5), (5,), ())]


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5)])
def test_against_the_oracle(monkeypatch, kernels, foreach, dtype, tolerance):
    monkeypatch.setenv("HVD_EXT_KERNELS", kernels)
    parameters = parameters_of(dtype)
    before = [p.detach().double().numpy().copy() for p in parameters]
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3}
    _, gradients = run(parameters, 30, foreach=foreach, **settings)
    for index, parameter in enumerate(parameters):
        w = before[index]
        state = {name: np.zeros_like(w) for name in ("m", "v", "vhat")}
        for step in gradients:
            w = amsgrad_step(w, step[index], state, lr=0.03, beta1=0.8, beta2=0.95, eps=1e-3)
        np.testing.assert_allclose(parameter.detach().double().numpy(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [
    {}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"weight_decay": 0.1, "maximize": True}], ids=str)
def test_the_compiled_update_is_pytorchs(monkeypatch, options):
    """But for the square root, which PyTorch takes from a library that may round it otherwise."""
    pytest.importorskip("numba")
    found = {}
    for way in ("plain", "auto"):
        monkeypatch.setenv("HVD_EXT_KERNELS", way)
        parameters = [*parameters_of(), torch.nn.Parameter(
            torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(
                memory_format=torch.channels_last))]
        parameters[0].data[0, 0] = torch.inf
        optimizer, _ = run(parameters, 5, lr=0.1, **options)
        found[way] = [*parameters, *(one for state in optimizer.state.values() for one in state.values())]
    for plain, compiled in zip(*found.values(), strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-12, atol=1e-13, equal_nan=True)


def test_the_update_goes_through_the_compiled_loop(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setenv("HVD_EXT_KERNELS", "auto")
    monkeypatch.setattr("hvd_ext.kernels.amsgrad.update_amsgrad", lambda w, *args, **kwargs: w.fill(7.0))
    half, single = parameters_of(torch.float16), parameters_of(torch.float32)
    single.append(torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)))
    run([*half, *single], 1)
    assert all((one == 7.0).all() for one in single)
    assert not any((one == 7.0).any() for one in half)


def test_it_is_not_torchs_adam():
    mine, theirs = parameters_of(), parameters_of()
    run(mine, 1, lr=0.1)
    adam = torch.optim.Adam(theirs, lr=0.1, amsgrad=True)
    generator = torch.Generator().manual_seed(0)
    for p in theirs:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    adam.step()
    assert not torch.allclose(mine[0], theirs[0], rtol=0.1)


def test_weight_decay_in_the_gradient_and_beside_it():
    coupled, plain = parameters_of(), parameters_of()
    optimizer = AMSGrad(coupled, 0.1, weight_decay=0.3)
    for p in coupled:
        p.grad = torch.ones_like(p)
    optimizer.step()
    other = AMSGrad(plain, 0.1)
    for p in plain:
        p.grad = torch.ones_like(p) + 0.3 * p.detach()
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(coupled, plain, strict=True))

    decoupled = parameters_of()
    start = [p.detach().clone() for p in decoupled]
    optimizer = AMSGrad(decoupled, 0.1, weight_decay=0.3, decoupled_weight_decay=True)
    for p in decoupled:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.allclose(p, w * (1 - 0.03)) for p, w in zip(decoupled, start, strict=True))


def test_maximize_is_the_other_way():
    up, down = parameters_of(), parameters_of()
    start = [p.detach().clone() for p in up]
    run(up, 1, maximize=True)
    run(down, 1)
    for u, d, w in zip(up, down, start, strict=True):
        assert torch.allclose(u - w, w - d)


def test_groups_state_and_missing_gradients():
    first, second, third = parameters_of()
    optimizer = AMSGrad([{"params": [first], "lr": 0.0}, {"params": [second, third]}], 0.1)
    before = [first.detach().clone(), third.detach().clone()]
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    optimizer.step()
    assert torch.equal(first, before[0])
    assert torch.equal(third, before[1])
    assert set(optimizer.state) == {first, second}
    saved = copy.deepcopy(optimizer.state_dict())
    twin = parameters_of()
    with torch.no_grad():
        for p, q in zip(twin, (first, second, third), strict=True):
            p.copy_(q)
    restored = AMSGrad([{"params": twin[:1], "lr": 0.0}, {"params": twin[1:]}], 0.7)
    restored.load_state_dict(saved)
    for p, q in zip(twin, (first, second, third), strict=True):
        p.grad = q.grad = torch.full_like(q, 0.5)
    optimizer.step()
    restored.step()
    assert all(torch.equal(p, q) for p, q in zip(twin, (first, second, third), strict=True))


def test_closure_is_called_with_gradients_on():
    (p,) = [torch.nn.Parameter(torch.ones(3))]
    optimizer = AMSGrad([p])

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 3.0
    assert bool((p < 1).all())


@pytest.mark.parametrize(("settings", "said"), [
    ({"lr": -1}, r"lr must be in \[0, inf\)"), ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\)"),
    ({"eps": 0.0}, r"eps must be in \(0, inf\).*under the root"),
    ({"weight_decay": -0.1}, "weight_decay must be in"),
])
def test_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        AMSGrad(parameters_of(), **settings)
    with pytest.raises(TypeError, match="betas must be a pair"):
        AMSGrad(parameters_of(), betas=0.9)
    with pytest.raises(TypeError, match="foreach must be True or False"):
        AMSGrad(parameters_of(), foreach=None)


def test_sparse_gradient():
    table = torch.nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        AMSGrad(table.parameters()).step()


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_state_in_float32(foreach, dtype):
    parameters = parameters_of(dtype)
    optimizer = AMSGrad(parameters, 0.01, foreach=foreach)
    before = [p.detach().double().numpy().copy() for p in parameters]
    states = [{name: np.zeros_like(w) for name in ("m", "v", "vhat")} for w in before]
    for step in range(5):
        for index, p in enumerate(parameters):
            p.grad = torch.full_like(p, 0.0 if step == 0 else 1e-4)  # whose square underflows in float16
            gradient = p.grad.double().numpy()
            expected = amsgrad_step(p.detach().double().numpy(), gradient, states[index], lr=0.01,
                                    beta1=0.9, beta2=0.999, eps=1e-8)
            before[index] = expected
        optimizer.step()
        for p, expected in zip(parameters, before, strict=True):
            np.testing.assert_allclose(p.detach().double().numpy(), expected, atol=1e-3,
                                       rtol=2 * torch.finfo(dtype).eps)
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    restored = AMSGrad(parameters_of(dtype), 0.01)
    restored.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(optimizer.state.values(), restored.state.values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)

"""Each kind of layer: captured U equals looped autograd, and p equals (U U^T + lam I)^{-1} g."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hvd_ext.torch as hvd
from hvd_ext.torch.seng import implicit_unfold, rules
from tests.reference import seng as reference
from tests.torch.per_sample import by_masking, by_single_samples, flat_gradient, held_u

LAM = 0.3


class Flat(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.flatten(1))


CASES = {
    "linear": (lambda: nn.Linear(5, 3), (6, 5)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (6, 5)),
    "linear, three dimensions": (lambda: nn.Linear(4, 3), (5, 7, 4)),
    "linear, four dimensions": (lambda: nn.Linear(4, 3), (5, 2, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (4, 2, 8)),
    "conv1d, circular": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (4, 2, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (4, 3, 6, 6)),
    "conv2d, stride, no bias": (lambda: nn.Conv2d(3, 4, 3, 2, 1, bias=False), (4, 3, 7, 6)),
    "conv2d, reflect": (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (4, 3, 5, 5)),
    "conv2d, replicate": (lambda: nn.Conv2d(2, 2, (3, 2), padding=(1, 0), padding_mode="replicate"),
                          (4, 2, 5, 5)),
    "conv2d, dilation": (lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=1), (4, 2, 7, 7)),
    "conv2d, same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same"), (4, 2, 6, 5)),
    "conv2d, 1 × 1 with stride": (lambda: nn.Conv2d(4, 3, 1, stride=2), (4, 4, 5, 5)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 5, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=1), (3, 2, 4, 5, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (4, 3, 4, 5)),
    "transposed, output padding, groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (4, 4, 3, 4)),
    "transposed, dilation, no bias": (
        lambda: nn.ConvTranspose2d(2, 3, (2, 3), dilation=2, bias=False), (4, 2, 4, 3)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(5), (6, 5)),
    "batch norm 1d, sequences": (lambda: nn.BatchNorm1d(3), (4, 3, 5)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(3), (5, 3, 4, 4)),
    "batch norm 2d, evaluating": (lambda: nn.BatchNorm2d(3).eval(), (5, 3, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm(6), (5, 3, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm((2, 3), bias=False), (5, 2, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (5, 4, 3, 3)),
}
PRODUCTS = [name for name in CASES if not name.endswith(("evaluating",)) and "norm" not in name]


def problem(case: str, dtype: torch.dtype = torch.float64):
    torch.manual_seed(3)
    make, shape = CASES[case]
    layer = make().to(dtype)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    model = nn.Sequential(layer, Flat())
    x = torch.randn(shape, dtype=dtype)
    target = torch.randn_like(model(x))
    return model, layer, x, target


def mean_loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 0.5 * (out - target).square().sum() / out.shape[0]


@pytest.mark.parametrize("case", CASES)
def test_captured_gradients_and_direction(case):
    model, module, x, target = problem(case)
    seng = hvd.SENG(model, damping=LAM, sketch=None)
    shares = by_masking(model, module, lambda out: mean_loss(out, target), x, x.shape[0])
    mean_loss(model(x), target).backward()
    (layer,) = seng.layers
    g = flat_gradient(layer)
    seng.step()
    u = reference.dense_u(torch.cat([s.flatten(1) for s in shares.values()], 1).numpy())
    np.testing.assert_allclose(held_u(seng, layer).numpy(), u, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(u.sum(1) / np.sqrt(len(x)), g.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        flat_gradient(layer).numpy(), reference.direction(u, g.numpy(), LAM), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("conv2d")])
@pytest.mark.parametrize("settings", [{}, {"explicit_threshold": 0, "rank": 2, "uc": "exact"}])
def test_convolution_whose_patches_are_not_copied_equals_one_whose_are(case, settings, monkeypatch):
    model, _module, x, target = problem(case)
    found = []
    for least in (1, 10**9):
        monkeypatch.setattr(implicit_unfold, "MIN_POSITIONS", least)
        seng = hvd.SENG(model, damping=LAM, sketch=None, update_freq=1, **settings)
        for _ in range(2):  # checked against the gradient, then not
            model.zero_grad()
            mean_loss(model(x), target).backward()
            seng.step()
            found.append((held_u(seng, seng.layers[0]).numpy(), flat_gradient(seng.layers[0]).numpy()))
        seng.close()
    for u, p in found[:3]:
        np.testing.assert_allclose(u, found[3][0], rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(p, found[3][1], rtol=1e-7, atol=1e-10)


def test_products_with_shifted_input_are_those_with_its_patches(monkeypatch):
    monkeypatch.setattr(implicit_unfold, "MIN_POSITIONS", 1)
    torch.manual_seed(0)
    module = nn.Conv2d(3, 4, (3, 2), dilation=(1, 2), padding=(2, 1)).double()
    x = torch.randn(5, 3, 6, 7).double()
    factors = rules.rule_for(module)[0].rule(module, x, torch.randn_like(module(x)), lambda t: t)
    assert isinstance(factors, rules.Convolved)
    v = torch.randn(5, 1, factors.a.shape[2], 3).double()
    torch.testing.assert_close(factors.shifted.multiply(v), factors.a.mT @ v)
    torch.testing.assert_close(replace(factors.shifted, ones=True).multiply(v)[:, :, -1], v.sum(2))
    torch.testing.assert_close(factors.shifted.per_sample_products(factors.g),
                               torch.matmul(factors.g.mT, factors.a).flatten(1))
    assert not isinstance(rules.rule_for(module)[0].rule(
        nn.Conv2d(3, 4, 3, stride=2), x, torch.randn(5, 4, 2, 3).double(), lambda t: t), rules.Convolved)


@pytest.mark.parametrize("case", PRODUCTS)
def test_implicit_with_everything_kept_equals_explicit(case):
    model, _module, x, target = problem(case)
    found = []
    for threshold in (10**9, 0):
        seng = hvd.SENG(model, damping=LAM, sketch=None, rank=10**6, uc="exact",
                        explicit_threshold=threshold)
        model.zero_grad()
        mean_loss(model(x), target).backward()
        seng.step()
        assert seng.report()["layers"][0]["held"] == ("implicit" if threshold == 0 else "explicit")
        found.append(flat_gradient(seng.layers[0]).numpy())
        seng.close()
    np.testing.assert_allclose(found[1], found[0], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("case", ["linear", "conv2d", "conv2d, groups", "transposed"])
def test_factored_product_equals_the_equation(case):
    model, _module, x, target = problem(case)
    seng = hvd.SENG(model, damping=LAM, sketch=None, rank=10**6, explicit_threshold=0)
    mean_loss(model(x), target).backward()
    (layer,) = seng.layers
    g = flat_gradient(layer)
    seng.step()
    u = held_u(seng, layer).numpy()
    c = reference.coefficients(u, g.numpy(), LAM)
    block = seng.state.systems[layer].blocks[0]
    rho = len(x)
    split = [factor.permute(3, 0, 1, 2).numpy() for factor in (block.g, block.a)]
    product = np.stack([
        reference.factored_product([split[0][i, k] for i in range(rho)],
                                   [split[1][i, k] for i in range(rho)], c)
        for k in range(block.g.shape[0])])
    wanted = [product[..., :block.width].ravel()]
    if case == "transposed":
        start = layer.parameters[0].numel()
        wanted.append(u[start:] @ c)
    else:
        wanted.append(product[..., block.width:].ravel())
    np.testing.assert_allclose(
        flat_gradient(layer).numpy(), (g.numpy() - np.concatenate(wanted)) / LAM, rtol=1e-8,
        atol=1e-11)


class Twice(nn.Module):
    """One module used twice, and two modules that share a weight, with biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(4, 4)
        self.one = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.again(torch.tanh(self.again(x))))
        return self.other(torch.relu_(self.one(x)))


@pytest.mark.parametrize("threshold", [10**9, 0])
def test_modules_used_twice_and_tied_weights(threshold):
    torch.manual_seed(0)
    model = Twice().double()
    x, target = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    seng = hvd.SENG(model, damping=LAM, sketch=None, rank=100, uc="exact",
                    explicit_threshold=threshold)
    again, tied = seng.layers
    assert [len(layer.parameters) for layer in seng.layers] == [2, 3]
    mean_loss(model(x), target).backward()
    g = {layer: flat_gradient(layer).numpy() for layer in seng.layers}
    seng.step()
    for layer in (again, tied):
        shares = by_single_samples(model, lambda out, i: mean_loss(out, target[i]), x,
                                   layer.parameters)
        u = reference.dense_u(torch.cat([s.flatten(1) for s in shares], 1).numpy())
        np.testing.assert_allclose(held_u(seng, layer).numpy(), u, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(flat_gradient(layer).numpy(),
                                   reference.direction(u, g[layer], LAM), rtol=1e-7)


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_an_activation_in_place_behind_a_layer(shape, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias), nn.ReLU(True), nn.Linear(6, 3), nn.ReLU(True),
                          nn.Flatten()).double()
    x = torch.randn(shape).double()
    target = torch.randn_like(model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        against_single_samples(model, hvd.SENG(model, damping=LAM, sketch=None), x, target)


def test_summed_loss_and_loss_scale():
    model, module, x, target = problem("conv2d")
    shares = by_masking(model, module, lambda out: 0.5 * (out - target).square().sum(), x, 1.0)
    u = reference.dense_u(torch.cat([s.flatten(1) for s in shares.values()], 1).numpy())
    for reduction, factor in (("sum", 1.0), ("mean", 0.25)):
        seng = hvd.SENG(model, damping=LAM, sketch=None, loss_reduction=reduction,
                        loss_scale=factor)
        model.zero_grad()
        loss = 0.5 * (model(x) - target).square().sum()
        (loss * factor / (1 if reduction == "sum" else x.shape[0])).backward()
        seng.step()
        np.testing.assert_allclose(held_u(seng, seng.layers[0]).numpy(), u, rtol=1e-9, atol=1e-12)
        seng.close()


def test_subsample_takes_some_columns_and_whole_batch_statistics():
    model, module, x, target = problem("batch norm 2d")
    shares = by_masking(model, module, lambda out: mean_loss(out, target), x, x.shape[0])
    every = torch.cat([s.flatten(1) for s in shares.values()], 1)
    seng = hvd.SENG(model, damping=LAM, sketch=None, subsample=2)
    mean_loss(model(x), target).backward()
    seng.step()
    kept = held_u(seng, seng.layers[0]).T * 2**0.5
    nearest = torch.cdist(kept, every)
    assert nearest.shape == (2, 5)
    assert (nearest.min(1).values < 1e-9).all()
    assert len(set(nearest.argmin(1).tolist())) == 2


def test_frozen_layers_and_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    seng = hvd.SENG(model, damping=LAM, sketch=None, explicit_threshold=0)
    x = torch.randn(5, 3).double()
    mean_loss(model(x), torch.zeros(5, 2).double()).backward()
    seng.step()
    rows = seng.report()["layers"]
    assert [(row["layer"], row["n"], row["held"]) for row in rows] == [
        ("1", 4, "explicit"), ("2", 10, "implicit")]
    assert model[0].weight.grad is None
    model[0].requires_grad_(True)
    seng.reset_state()
    assert [row["layer"] for row in seng.report()["layers"]] == ["0", "1", "2"]


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def own_rule(module, x, gz, pick):
    return {"weight": pick(x) * pick(gz)}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.rnn = nn.LSTM(4, 4, batch_first=True)
        self.own = Own()
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.attention(x, x, x)
        x, _ = self.rnn(x)
        return self.head(self.own(x[:, -1]))


def against_single_samples(model: nn.Module, seng, x: torch.Tensor, target: torch.Tensor) -> None:
    """One step: each layer's direction is the dense one from one sample's pass after the other."""
    model.zero_grad()
    mean_loss(model(x), target).backward()
    g = {layer: flat_gradient(layer).numpy() for layer in seng.layers}
    seng.step()
    for layer in seng.layers:
        shares = by_single_samples(model, lambda out, i: mean_loss(out, target[i]), x,
                                   layer.parameters)
        u = reference.dense_u(torch.cat([s.flatten(1) for s in shares], 1).numpy())
        np.testing.assert_allclose(flat_gradient(layer).numpy(),
                                   reference.direction(u, g[layer], LAM), rtol=1e-7, atol=1e-12)


def test_modules_that_treat_samples_apart_need_no_rule_of_their_own():
    torch.manual_seed(0)
    model = Mixed().double()
    x, target = torch.randn(5, 3, 4).double(), torch.randn(5, 2).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seng = hvd.SENG(model, damping=LAM, sketch=None)
        against_single_samples(model, seng, x, target)
    report = seng.report()
    assert [row["layer"] for row in report["layers"]] == [
        "attention", "attention.out_proj", "rnn", "own", "head"]
    assert report["coverage"] == 1.0
    assert str(report).startswith("SENG has a rule for 100 % of 254 parameters.\n")


@pytest.mark.parametrize("other", ["identity", "matched", "none"])
def test_layers_without_a_rule_fall_back_with_one_warning_and_a_rule_can_be_registered(other):
    torch.manual_seed(0)
    model = Mixed().double()
    with pytest.warns(UserWarning, match="no rule") as said:
        seng = hvd.SENG(model, damping=LAM, sketch=None, check_gradients=False, fallback=other)
    assert len(said) == 1
    for name in ("rnn (LSTM)", "own (Own)", seng.settings.fallback_text):
        assert name in str(said[0].message)
    x, target = torch.randn(5, 3, 4).double(), torch.randn(5, 2).double()
    mean_loss(model(x), target).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    seng.step()
    divisor = {"identity": 1 + LAM, "matched": LAM, "none": 1.0}[other]
    for name, p in model.named_parameters():
        if not name.startswith(("head", "attention")):
            torch.testing.assert_close(p.grad, before[name] / divisor)
    report = seng.report()
    assert report["rate_ratio"] == pytest.approx(divisor / LAM)
    assert report["without_rule"]["no rule"] == {
        "parameters": 164, "modules": ["rnn, LSTM", "own, Own"]}
    assert "no rule (rnn, LSTM, own, Own)" in str(report).splitlines()[0]
    seng.close()

    hvd.register_seng_rule(Own, own_rule, replace=True)
    try:
        with pytest.raises(ValueError, match="replace=True"):
            hvd.register_seng_rule(Own, own_rule)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            seng = hvd.SENG(model, damping=LAM, sketch=None, exclude=["attention", "rnn"],
                            check_gradients=False)
        assert [row["layer"] for row in seng.report()["layers"]] == ["own", "head"]
        against_single_samples(model, seng, x, target)
    finally:
        del rules._RULES[Own]


def test_weight_shared_with_a_module_without_a_rule_falls_back():
    class Shared(nn.Module):
        """It holds a parameter beside other modules, so no rule is tried on it."""

        def __init__(self) -> None:
            super().__init__()
            self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.table = self.head.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.middle(x)) + x @ self.table.T

    model = Shared()
    with pytest.warns(UserWarning, match=r"head \(Linear, shares a weight\)"):
        seng = hvd.SENG(model, damping=LAM)
    assert [row["layer"] for row in seng.report()["layers"]] == ["middle"]
    F.cross_entropy(model(torch.randn(3, 4)), torch.tensor([2, 3, 4])).backward()
    before = model.table.grad.clone()
    seng.step()
    torch.testing.assert_close(model.table.grad, before / (1 + LAM))
    assert "no rule" in seng.report()["without_rule"]

"""From step to step on one rank: hooks, refreshes, failures."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hvd_ext.torch as hvd
from tests.reference import seng as reference
from tests.torch.per_sample import flat_gradient, held_u
from tests.torch.small import LAM, batch, loss_of, network, same, train


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks)
               for m in model.modules())


def test_hooks_exist_only_on_refresh_steps():
    model = network()
    seng = hvd.SENG(model, damping=LAM, update_freq=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for seed in range(7):
        seen.append(hooks(model))
        train(model, seng, optimizer, [seed])
        assert not seng.capture._open
    assert [count > 0 for count in seen] == [True, False, False, True, False, False, True]
    seng.reset_state()
    assert hooks(model)
    seng.close()
    assert not hooks(model)


def test_curvature_stays_between_refreshes_and_damping_follows_its_schedule():
    model = network()

    def damping(step: int) -> float:
        return LAM / (1 + step)

    seng = hvd.SENG(model, damping=damping, update_freq=3, sketch=None)
    held = None
    for step in range(4):
        model.zero_grad()
        loss_of(model, batch(step)).backward()
        g = [flat_gradient(layer).numpy() for layer in seng.layers]
        seng.step()
        now = [held_u(seng, layer).numpy() for layer in seng.layers]
        if step in (1, 2):
            for old, new in zip(held, now, strict=True):
                np.testing.assert_array_equal(old, new)
        elif step == 3:
            assert not np.array_equal(held[0], now[0])
        held = now
        for layer, u, gradient in zip(seng.layers, now, g, strict=True):
            np.testing.assert_allclose(flat_gradient(layer).numpy(),
                                       reference.direction(u, gradient, damping(step)), rtol=1e-6,
                                       atol=1e-9)


@pytest.mark.parametrize("threshold", [0, 10**9])
def test_bound_counts_the_gradient_as_one_more_column_of_old_curvature(threshold):
    model = network()
    seng = hvd.SENG(model, damping=LAM, update_freq=3, sketch=None, stale_curvature="rescale", uc="exact",
                    rank=100,
                    explicit_threshold=threshold)
    for step in range(5):
        model.zero_grad()
        loss_of(model, batch(step)).backward()
        g = [flat_gradient(layer).numpy() for layer in seng.layers]
        seng.step()
        for layer, gradient in zip(seng.layers, g, strict=True):
            wanted = reference.bound_direction if step % 3 else reference.direction
            p = flat_gradient(layer).numpy()
            np.testing.assert_allclose(p, wanted(held_u(seng, layer).numpy(), gradient, LAM), rtol=1e-6,
                                       atol=1e-9)
            assert not step % 3 or gradient @ p < 1.0


def test_lagged_on_one_rank_is_the_equation():
    model = network()
    seng = hvd.SENG(model, damping=LAM, update_freq=3, sketch=None, coupling="lagged")
    previous = None
    for step in range(8):
        model.zero_grad()
        loss_of(model, batch(step)).backward()
        g = [flat_gradient(layer).numpy() for layer in seng.layers]
        seng.step()
        for k, layer in enumerate(seng.layers):
            u = held_u(seng, layer).numpy()
            lagged = g[k] if previous is None else previous[k]
            np.testing.assert_allclose(flat_gradient(layer).numpy(),
                                       reference.block_direction([u], g[k], LAM, lagged),
                                       rtol=1e-6, atol=1e-9)
        previous = g


def test_forward_passes_without_a_backward_pass_do_not_count():
    model = network()
    seng = hvd.SENG(model, damping=LAM, sketch=None)
    with torch.no_grad():
        model(batch(5)[0])
    model(batch(6)[0])
    loss_of(model, batch(0)).backward()
    seng.step()
    assert all(row["rho"] == 6 and row["failures"] == 0 for row in seng.report()["layers"])


def test_gradient_that_is_not_finite_is_left_alone_and_the_refresh_comes_next():
    for coupling in ("block", "lagged"):
        model = network()
        seng = hvd.SENG(model, damping=LAM, update_freq=2, coupling=coupling)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, seng, optimizer, [0, 1])
        before = seng.state_dict()
        model.zero_grad()
        loss_of(model, batch(2)).backward()
        model[6].bias.grad[1] = float("nan")
        grads = [p.grad.clone() for p in model.parameters()]
        seng.step()
        for p, g in zip(model.parameters(), grads, strict=True):
            np.testing.assert_array_equal(p.grad.numpy(), g.numpy())
        after = seng.state_dict()
        assert after.pop("skipped") == before.pop("skipped") + 1
        assert same(before, after)
        assert hooks(model)
        train(model, seng, optimizer, [3])
        assert seng.report()["layers"][0]["age"] == 1


class Poisoned(nn.Module):
    """A scale whose captured gradients can be made useless."""

    broken = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def poisoned_rule(module, x, gz, pick):
    u = pick(x) * pick(gz)
    return {"weight": u * float("nan") if Poisoned.broken else u}


def test_captured_tensor_that_is_not_finite_keeps_the_previous_curvature_and_says_so_once():
    hvd.register_seng_rule(Poisoned, poisoned_rule, replace=True)
    model = nn.Sequential(network(), Poisoned())
    seng = hvd.SENG(model, damping=LAM, update_freq=1, sketch=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Poisoned.broken = True
    try:
        loss_of(model, batch(0)).backward()
        g = model[1].weight.grad.clone()
        with pytest.warns(UserWarning, match=r"could not refresh 1: .*not finite.* g/\(1"):
            seng.step()
        torch.testing.assert_close(model[1].weight.grad, g / (1 + LAM))
        Poisoned.broken = False
        train(model, seng, optimizer, [1])
        layer = seng.layers[-1]
        held = held_u(seng, layer)
        Poisoned.broken = True
        with pytest.warns(UserWarning, match="keeps its previous curvature"):
            train(model, seng, optimizer, [2])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, seng, optimizer, [3])
    finally:
        Poisoned.broken = False
    assert torch.equal(held_u(seng, layer), held)
    row = seng.report()["layers"][-1]
    assert (row["failures"], row["age"]) == (3, 3)
    assert seng.report()["layers"][0]["age"] == 1
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_system_that_cannot_be_factored_keeps_the_previous_curvature(monkeypatch):
    from hvd_ext.torch.seng import kernels as seng_kernels

    model = network()
    seng = hvd.SENG(model, damping=LAM, update_freq=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, seng, optimizer, [0])
    monkeypatch.setattr(seng_kernels, "factor_all", lambda grams, lam: (
        grams, [0.0] * len(grams), [False] * len(grams)))
    with pytest.warns(UserWarning, match="could not be factored"):
        train(model, seng, optimizer, [1])
    assert {row["age"] for row in seng.report()["layers"]} == {2}


def test_layer_that_no_forward_pass_used_is_said_and_left():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Half()
    seng = hvd.SENG(model, damping=LAM)
    model(torch.randn(4, 3)).square().mean().backward()
    with pytest.warns(UserWarning, match="unused: it was not used"):
        seng.step()
    assert model.unused.weight.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_does_not_change_the_curvature(reentrant):
    found = []
    for checkpointed in (False, True):
        model = network()
        seng = hvd.SENG(model, damping=LAM, sketch=None)
        for seed in (0, 1):
            x, y = batch(seed)
            x.requires_grad_()
            out = (checkpoint(model[3:], model[:3](x), use_reentrant=reentrant) if checkpointed
                   else model(x))
            nn.functional.cross_entropy(out, y).backward()
            if reentrant:
                # Its modules run in the backward pass only, so the first micro-batch counts.
                break
        seng.step()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rho", [5, 1])
def test_last_batch_of_another_size(rho):
    model = network()
    seng = hvd.SENG(model, damping=LAM, update_freq=2, sketch=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, seng, optimizer, range(5), rho=lambda seed: rho if seed in (1, 2) else 6)
    assert seng.report()["layers"][0]["rho"] == 6
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_accumulated_micro_batches_take_the_curvature_of_the_last():
    model = network()
    seng = hvd.SENG(model, damping=LAM, sketch=None, loss_scale=0.5)
    for seed in (0, 1):
        (loss_of(model, batch(seed)) / 2).backward()
    seng.step()
    alone = network()
    other = hvd.SENG(alone, damping=LAM, sketch=None)
    alone.load_state_dict(model.state_dict())
    loss_of(alone, batch(1)).backward()
    other.step()
    for one, two in zip(seng.layers, other.layers, strict=True):
        torch.testing.assert_close(held_u(seng, one), held_u(other, two))


def test_memory_format_does_not_matter():
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = network().to(memory_format=layout)
        seng = hvd.SENG(model, damping=LAM, sketch=None)
        data = batch(0)
        loss_of(model, (data[0].to(memory_format=layout), data[1])).backward()
        seng.step()
        found.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_another_number_of_ranks_drops_what_depends_on_it():
    class Ranks:
        size = 1

    model = network()
    seng = hvd.SENG(model, damping=LAM, update_freq=10, coupling="lagged")
    seng.attach(None, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, seng, optimizer, [0, 1])
    assert seng.state.lagged.pending
    assert not hooks(model)
    seng._ranks = 2
    seng.attach(Ranks(), None)
    assert not seng.state.lagged.pending
    assert hooks(model)
    train(model, seng, optimizer, [2])
    assert seng.report()["layers"][0]["age"] == 1


def test_a_diverging_run_says_so_once_and_names_damping():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    seng = hvd.SENG(model, damping=1e-3, update_freq=50)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(60):
            optimizer.zero_grad()
            model(torch.randn(6, 3)).square().mean().backward()
            seng.step()
            optimizer.step()
    assert not all(bool(torch.isfinite(p).all()) for p in model.parameters())
    (about,) = (str(one.message) for one in said if "not finite any more" in str(one.message))
    assert "damping=0.001" in about


def test_dropped_layers_are_one_warning_each_way():
    """Stochastic depth: other layers are without a pass at each refresh."""
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
            self.step = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for k, block in enumerate(self.blocks):
                if (k + self.step) % 3:
                    x = x + torch.tanh(block(x))
            return x

    torch.manual_seed(0)
    model = Dropping()
    seng = hvd.SENG(model, damping=LAM, update_freq=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for model.step in range(5):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            seng.step()
            optimizer.step()
    about = sorted(str(one.message) for one in said)
    assert len(about) == 2
    assert "could not refresh blocks.0, blocks.3: it was not used" in about[0]
    assert "gets g/(1 + damping) until then" in about[0]
    assert "keeps its previous curvature" in about[1]
    assert seng.report()["failures"] == 10


@pytest.mark.parametrize("how", ["file", "copy"])
def test_a_model_is_saved_whole_while_hooks_are_installed(tmp_path, how):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    x = torch.randn(4, 6)
    seng = hvd.SENG(model, damping=1.0, update_freq=1)
    assert any(module._forward_hooks for module in model.modules())
    if how == "file":
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        other = copy.deepcopy(model)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    other(x).sum().backward()  # of no interest to SENG
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    seng.precondition()
    assert seng.report()["layers"]
    assert not any(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    seng.close()

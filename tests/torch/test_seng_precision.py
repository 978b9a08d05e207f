"""SENG with scaled losses, half precision and curvature in bfloat16."""

from __future__ import annotations

import warnings

import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.small import LAM, batch, loss_of, network


def test_scaled_loss_is_unscaled():
    plain, scaled = network(torch.float32), network(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for model, own in ((plain, None), (scaled, scaler)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seng = hvd.SENG(model, damping=LAM, sketch=None, grad_scaler=own)
        loss = loss_of(model, batch(0, dtype=torch.float32))
        (loss if own is None else own.scale(loss)).backward()
        if own is not None:
            own.unscale_(optimizer)
        seng.step()
    for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_autocast_with_a_gradient_scaler_trains_through_an_overflow():
    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 / 64)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    seng = hvd.SENG(model, damping=LAM, update_freq=2, grad_scaler=scaler, loss_scale=64.0)
    data = batch(0, dtype=torch.float32)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = 64.0 * loss_of(model, data)
            losses.append(loss.item())
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            seng.step()
            scaler.step(optimizer)
            scaler.update()
    assert seng.report()["skipped"] > 0
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision(dtype):
    model, exact = network(dtype), network(torch.float32)
    exact.load_state_dict(model.state_dict())
    for one in (model, exact):
        seng = hvd.SENG(one, damping=LAM, sketch=None)
        loss_of(one, batch(0, dtype=next(one.parameters()).dtype)).backward()
        seng.step()
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert one.grad.dtype == dtype
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=0.1, atol=0.05)


def test_curvature_in_bfloat16_takes_half_the_bytes_and_stays_close():
    found = {}
    for name in (None, "bfloat16"):
        for threshold in (0, 10**9):
            model = network(torch.float32)
            seng = hvd.SENG(model, damping=LAM, explicit_threshold=threshold, sketch=None,
                            uc="exact", rank=100, curvature_dtype=name)
            loss_of(model, batch(0, dtype=torch.float32)).backward()
            seng.step()
            row = seng.report()["layers"][2]
            found[name, threshold] = (row["formula_bytes"], model[3].weight.grad)
    for threshold in (0, 10**9):
        (big, exact), (small, close) = found[None, threshold], found["bfloat16", threshold]
        assert small * 2 == big
        torch.testing.assert_close(close, exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))


@pytest.mark.parametrize("coupling", ["block", "lagged"])
def test_scaled_gradients_of_a_distributed_optimizer_pass_through(coupling):
    """``attach`` says that gradients come still scaled, by another factor at each step."""
    class Scaler:
        scale = 1.0

        def get_scale(self) -> float:
            return self.scale

        def is_enabled(self) -> bool:
            return True

    plain, scaled, scaler = network(), network(), Scaler()
    one = hvd.SENG(plain, damping=LAM, update_freq=3, coupling=coupling, explicit_threshold=200)
    two = hvd.SENG(scaled, damping=LAM, update_freq=3, coupling=coupling, explicit_threshold=200)
    two.attach(None, None)
    two.set_grad_scaler(scaler)
    for step in range(7):
        scaler.scale = [8.0, 8.0, 4.0, 16.0, 16.0, 2.0, 2.0][step]
        for model, seng, factor in ((plain, one, 1.0), (scaled, two, scaler.scale)):
            model.zero_grad()
            (factor * loss_of(model, batch(step))).backward()
            seng.before_reduce()
            seng.precondition()
            seng.commit()
        for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
            torch.testing.assert_close(q.grad / scaler.scale, p.grad)

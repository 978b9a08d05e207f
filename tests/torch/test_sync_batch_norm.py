"""Batch normalization over all ranks equals one process with the joined batch, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import hvd_ext.torch as hvd

pytestmark = pytest.mark.distributed
CHANNELS = 3
CASES = {
    "2-D": {"extra": ()}, "1d": {"extra": (4,)}, "2d": {"extra": (4, 2)}, "3d": {"extra": (2, 3, 2)},
    "no affine": {"extra": (4,), "affine": False}, "cumulative": {"extra": (4,), "momentum": None},
    "no statistics": {"extra": (4,), "track_running_stats": False},
    "uneven": {"extra": (4,), "sizes": (1, 6)}, "empty": {"extra": (4,), "sizes": (0, 5)},
}


def data(rows, extra):
    generator = torch.Generator().manual_seed(5)
    x = 3.0 + 2.0 * torch.randn((rows, CHANNELS, *extra), generator=generator, dtype=torch.float64)
    return x, torch.randn(x.shape, generator=generator, dtype=torch.float64)


def oracle(x, dy, weight, bias, eps=1e-5):
    """Normalized x, the gradients of sum(y dy) for x, weight and bias, mean and variances; NumPy."""
    x, dy = x.numpy(), dy.numpy()
    axes = tuple(a for a in range(x.ndim) if a != 1)
    shape = [1, -1] + [1] * (x.ndim - 2)
    n = x.size // x.shape[1]
    mean, var = x.mean(axes), x.var(axes)
    hat = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps)
    y = hat * weight.reshape(shape) + bias.reshape(shape)
    db, dw = dy.sum(axes), (dy * hat).sum(axes)
    dx = (weight / np.sqrt(var + eps)).reshape(shape) * (
        dy - db.reshape(shape) / n - hat * dw.reshape(shape) / n)
    return y, dx, dw, db, mean, var * n / (n - 1)


def layer(dtype, options):
    options = {key: value for key, value in options.items() if key not in ("extra", "sizes")}
    module = hvd.SyncBatchNorm(CHANNELS, dtype=dtype, **options)
    if module.affine:
        with torch.no_grad():
            module.weight.copy_(torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64))
            module.bias.copy_(torch.tensor([0.1, 0.0, 3.0], dtype=torch.float64))
    return module


def on_ranks(case, dtype_name, in_set):
    options, dtype = CASES[case], getattr(torch, dtype_name)
    sizes = options.get("sizes", (3, 3))
    processes = hvd.add_process_set([0, 1]) if in_set else None
    try:
        if processes is not None and not processes.included():
            return None
        x, dy = data(sum(sizes), options["extra"])
        part = slice(0, sizes[0]) if hvd.rank() == 0 else slice(sizes[0], sum(sizes))
        module = layer(dtype, {**options, "process_set": processes})
        mine = x[part].to(dtype).requires_grad_()
        for _ in range(2):
            module.zero_grad()
            mine.grad = None
            y = module(mine)
            y.backward(dy[part].to(dtype))
        weights = [None if p is None else p.grad.double().numpy() for p in (module.weight, module.bias)]
        running = [None if b is None else b.double().numpy()
                   for b in (module.running_mean, module.running_var)]
        module.eval()
        evaluated = module(mine).detach().double().numpy()
        return (y.detach().double().numpy(), mine.grad.double().numpy(), weights, running, evaluated)
    finally:
        if processes is not None:
            hvd.remove_process_set(processes)


def check(case, found, tolerance):
    options = CASES[case]
    x, dy = data(sum(options.get("sizes", (3, 3))), options["extra"])
    affine = options.get("affine", True)
    weight, bias = (np.array([1.0, 0.5, -2.0]), np.array([0.1, 0.0, 3.0])) if affine else (
        np.ones(3), np.zeros(3))
    y, dx, dw, db, mean, var = oracle(x, dy, weight, bias)
    near = {"rtol": tolerance, "atol": tolerance}
    np.testing.assert_allclose(np.concatenate([one[0] for one in found]), y, **near)
    np.testing.assert_allclose(np.concatenate([one[1] for one in found]), dx, **near)
    if affine:
        np.testing.assert_allclose(sum(one[2][0] for one in found), dw, **near)
        np.testing.assert_allclose(sum(one[2][1] for one in found), db, **near)
    if options.get("track_running_stats", True):
        share = 1.0 if options.get("momentum", 0.1) is None else 1 - 0.9**2  # of the same batch, twice
        for one in found:
            np.testing.assert_allclose(one[3][0], share * mean, **near)
            np.testing.assert_allclose(one[3][1], (1 - share) + share * var, **near)
        shape = [1, -1] + [1] * (x.dim() - 2)
        run_mean, run_var = found[0][3]
        expected = (x.numpy() - run_mean.reshape(shape)) / np.sqrt(run_var.reshape(shape) + 1e-5)
        expected = expected * weight.reshape(shape) + bias.reshape(shape)
        np.testing.assert_allclose(np.concatenate([one[4] for one in found]), expected, **near)


@pytest.mark.parametrize("case", CASES)
def test_against_the_joined_batch(ranks, case):
    check(case, ranks(2).run(on_ranks, case, "float64", False), 1e-10)


def test_float32(ranks):
    check("uneven", ranks(2).run(on_ranks, "uneven", "float32", False), 2e-5)


def converted():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(
        nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5, momentum=None, affine=False))).double()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8, 3, 5, 5, generator=generator, dtype=torch.float64)
    joint = model(x)
    joint.square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(
        nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5, momentum=None, affine=False))).double()
    before = list(model.parameters())
    same = hvd.convert_sync_batchnorm(model)
    assert same is model
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert [type(model[1]), type(model[3][2])] == [hvd.SyncBatchNorm] * 2
    assert [model[1].name, model[3][2].name] == ["1", "3.2"]
    assert model[3][2].momentum is None
    part = slice(0, 3) if hvd.rank() == 0 else slice(3, 8)
    y = model(x[part])
    torch.testing.assert_close(y, joint[part], rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    for parameter, joint_gradient in zip(model.parameters(), expected, strict=True):
        total = hvd.allreduce(parameter.grad, op=hvd.Sum)
        torch.testing.assert_close(total, joint_gradient, rtol=1e-8, atol=1e-8)
    model[1].eval()
    assert isinstance(hvd.convert_sync_batchnorm(nn.BatchNorm2d(2).eval()), hvd.SyncBatchNorm)
    assert not hvd.convert_sync_batchnorm(nn.BatchNorm2d(2).eval()).training
    return True


def test_a_converted_model(ranks):
    assert ranks(2).run(converted) == [True, True]


def too_few():
    module = hvd.SyncBatchNorm(2)
    with pytest.raises(ValueError, match=r"more than 1 value per channel.* 1 on all ranks"):
        module(torch.zeros(1 - hvd.rank(), 2))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        module(torch.zeros(3))
    return True


def test_one_value_on_all_ranks_together(ranks):
    assert ranks(2).run(too_few) == [True, True]


def test_over_a_process_set():
    from tests.ranks import run_ranks

    found = run_ranks(on_ranks, 3, "uneven", "float64", True, env={"HOROVOD_DYNAMIC_PROCESS_SETS": "1"})
    assert found[2] is None
    check("uneven", found[:2], 1e-10)

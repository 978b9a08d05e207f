"""The recursion kernel against the oracle, on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.torch.reducers.kernels.delay_compensation import Recursion, compensated_sum, plain_sum
from tests.reference.delay_compensation import DelayOracle
from tests.torch.problems import backward, flat, make_parameters, named, worker_gradients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("cumulative", [True, False])
@pytest.mark.parametrize("length", [0, 1, 1000, 200_001])  # more than one chunk of the cache
def test_recursion_is_the_oracles(device, adaptive, cumulative, length):
    workers, lr = 5, 0.4
    rng = np.random.default_rng(length)
    rows = [rng.standard_normal(length) for _ in range(workers)]
    oracle = DelayOracle(lam=1.3, adaptive=adaptive, decay=0.9, order="rank",
                         displacement="cumulative" if cumulative else "local")
    rule = Recursion(step=lr / workers, lam=1.3, adaptive=adaptive, decay=0.9, eps=1e-7,
                     cumulative=cumulative)
    mean_square = torch.zeros(length, device=device) if adaptive else None
    for _ in range(2):
        out = torch.full((length,), float("nan"), device=device)
        given = [torch.from_numpy(row).float().to(device) for row in rows]
        compensated_sum(given, rule, mean_square, out)
        np.testing.assert_allclose(out.cpu().numpy() / workers, oracle.reduce(rows, lr), rtol=2e-5,
                                   atol=2e-6)
        rows = [row * 0.5 for row in rows]
    if adaptive and length:
        np.testing.assert_allclose(mean_square.cpu().numpy(), oracle.mean_square, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("cumulative", [True, False])
def test_compiled_recursion_is_pytorchs_bit_for_bit(monkeypatch, dtype, adaptive, cumulative):
    """Where PyTorch's vectorised operations multiply and add with one rounding, which not all CPUs can."""
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(0)
    length = 200_001
    rows = [torch.randn(length, generator=generator, dtype=dtype) for _ in range(3)]
    rows[0][5], rows[1][6], rows[2][7] = torch.nan, torch.inf, 0.0
    rule = Recursion(step=0.1, lam=1.3, adaptive=adaptive, decay=0.9, eps=1e-7, cumulative=cumulative,
                     scale=0.5, divisor=3.0)
    found = {}
    for way in ("plain", "auto"):
        monkeypatch.setenv("HVD_EXT_KERNELS", way)
        square = torch.zeros(length, dtype=dtype) if adaptive else None
        out = torch.empty(length, dtype=dtype)
        for _ in range(2):
            compensated_sum(rows, rule, square, out)
        found[way] = [out, *([] if square is None else [square])]
    one_rounding = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    tolerance = {"rtol": 0.0, "atol": 0.0} if one_rounding else {}
    for plain, compiled in zip(*found.values(), strict=True):
        torch.testing.assert_close(compiled, plain, equal_nan=True, **tolerance)


def test_memory_that_kernels_have_seen_can_be_resized():
    """Horovod resizes what it receives into, which NumPy's views of a tensor forbid."""
    rows = [torch.randn(100) for _ in range(2)]
    square, out = torch.zeros(100), torch.empty(100)
    rule = Recursion(step=0.1, lam=1.3, adaptive=True, decay=0.9, eps=1e-7, cumulative=True)
    compensated_sum(rows, rule, square, out)
    parameter = torch.nn.Parameter(torch.randn(100))
    parameter.grad = torch.randn(100)
    hvd.AMSGrad([parameter]).step()
    for tensor in (*rows, square, out, parameter.data, parameter.grad):
        tensor.resize_(100_000)


@pytest.mark.parametrize("rows_place", [0, 1, 2])
@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_sum_may_take_the_place_of_a_row(monkeypatch, kernels, dtype, rows_place):
    monkeypatch.setenv("HVD_EXT_KERNELS", kernels)
    rows = [torch.randn(1000, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    rule = Recursion(step=0.1, lam=1.3, adaptive=True, decay=0.9, eps=1e-7, cumulative=True, divisor=3.0)
    expected = compensated_sum(rows, rule, torch.zeros(1000), torch.empty(1000, dtype=dtype))
    assert torch.equal(compensated_sum(rows, rule, torch.zeros(1000), rows[rows_place]), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_recursion_goes_through_the_compiled_loop(monkeypatch, threads):
    """Otherwise the comparison above would compare PyTorch with itself."""
    pytest.importorskip("numba")
    monkeypatch.setenv("HVD_EXT_KERNELS", "auto")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    parts = []
    monkeypatch.setattr("hvd_ext.kernels.recursion.compensated_sum",
                        lambda *args, **kwargs: parts.append(args[3:5]))
    rows = [torch.zeros(200_000) for _ in range(2)]
    rule = Recursion(step=0.1, lam=2.0, adaptive=False, decay=0.9, eps=1e-7, cumulative=True)
    compensated_sum(rows, rule, None, torch.zeros(200_000))
    assert sum(stop - start for start, stop in parts) == 200_000
    assert len(parts) == threads
    compensated_sum([row.half() for row in rows], rule, None, torch.zeros(200_000).half())
    assert len(parts) == threads  # half precision is PyTorch's


@pytest.mark.parametrize("device", DEVICES)
def test_scale_is_undone(device):
    """Rows that carry a loss scale give the sum that carries it, of the recursion without it."""
    rows = [torch.randn(500, generator=torch.Generator().manual_seed(i)).to(device) for i in range(3)]
    settings = {"step": 0.1, "lam": 2.0, "adaptive": True, "decay": 0.5, "eps": 1e-7, "cumulative": True}
    out, scaled = torch.empty(500, device=device), torch.empty(500, device=device)
    squares = [torch.zeros(500, device=device) for _ in range(2)]
    compensated_sum(rows, Recursion(**settings), squares[0], out)
    compensated_sum([row * 256 for row in rows], Recursion(**settings, scale=1 / 256), squares[1], scaled)
    torch.testing.assert_close(scaled / 256, out)
    torch.testing.assert_close(*squares)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(device, dtype):
    rows = [torch.full((64,), 1.0, dtype=dtype, device=device)] * 1000
    small = torch.full((64,), 2.0**-10, dtype=dtype, device=device)
    out = plain_sum([rows[0], *[small] * 1024], torch.empty(64, dtype=dtype, device=device))
    assert (out.float() == 2.0).all()  # in half precision the small ones would be lost


@pytest.mark.gpu
def test_microbatch_workers_on_cuda_tensors():
    """The whole optimizer on a GPU, one rank, 16 micro-batches."""
    hvd.init()
    shapes = [(33, 11), (), (7,)]
    parameters = [torch.nn.Parameter(p.detach().cuda()) for p in make_parameters(shapes)]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.3), named_parameters=named(parameters),
        backward_passes_per_step=16, op=hvd.DelayCompensated(virtual_workers="microbatch"),
    )
    for worker in range(16):
        gradients = worker_gradients(shapes, worker=worker, step=0, scale=1 / 16)
        backward(parameters, [torch.as_tensor(np.asarray(g)).cuda() for g in gradients])
    optimizer.synchronize()
    gradients = [flat(worker_gradients(shapes, worker=w, step=0)) for w in range(16)]
    expected = DelayOracle().reduce(gradients, 0.3)
    np.testing.assert_allclose(flat([p.grad for p in parameters]), expected, rtol=3e-5, atol=3e-6)

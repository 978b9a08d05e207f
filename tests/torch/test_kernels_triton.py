"""Triton's kernels against PyTorch's operations, on the CPU through Triton's interpreter.

``TRITON_INTERPRET`` counts when Triton is imported, hence a process of their own. They are skipped without
the extra ``triton`` (200 MB): ``make test-triton`` installs it and runs them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.torch.reducers.kernels import delay_compensation, topk
from hvd_ext.torch.reducers.kernels.delay_compensation import Recursion
from tests.reference.delay_compensation import DelayOracle
from tests.reference.spars_ams import amsgrad_step

SIZES = (0, 1, 1000, 1024, 5001)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                    reason="no Triton here: make test-triton installs it (200 MB)")
def test_kernels_through_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HVD_EXT_KERNELS": "plain"}
    done = subprocess.run([sys.executable, "-m", __name__], cwd=Path(__file__).parents[2], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["recursion", "topk", "amsgrad"]


def check_recursion(dtype, adaptive, cumulative):
    from hvd_ext.torch import kernels_triton

    for size in SIZES:
        rng = np.random.default_rng(size)
        oracle = DelayOracle(lam=1.3, adaptive=adaptive, decay=0.9, order="rank",
                             displacement="cumulative" if cumulative else "local")
        rule = Recursion(step=0.1, lam=1.3, adaptive=adaptive, decay=0.9, eps=1e-7, cumulative=cumulative,
                         divisor=3.0)
        squares = [torch.zeros(size, dtype=dtype) if adaptive else None for _ in range(2)]
        for turn in range(3):
            rows = [torch.from_numpy(rng.standard_normal(size)).to(dtype) for _ in range(3)]
            if turn == 2 and size:
                rows[0][0], rows[1][-1] = torch.inf, torch.nan
            found, expected = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
            kernels_triton.compensated_sum(rows, rule, squares[0], found)
            delay_compensation.compensated_sum(rows, rule, squares[1], expected)
            torch.testing.assert_close(found, expected, equal_nan=True)
            if adaptive:
                torch.testing.assert_close(*squares, equal_nan=True)
            if turn < 2:
                np.testing.assert_allclose(found, oracle.reduce([row.numpy() for row in rows], 0.3),
                                           rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def check_topk(dtype):
    from hvd_ext.torch import kernels_triton

    for size in SIZES:
        flat = torch.from_numpy(np.random.default_rng(size).standard_normal(size)).to(dtype)
        flat[: size // 3] = 0.0
        for threshold in (0.0, 0.5, 9.0):
            positions = kernels_triton.find_above(flat, threshold)
            magnitudes = flat.abs()
            expected = (magnitudes >= threshold) & (magnitudes > 0)
            assert torch.equal(positions, expected.nonzero().flatten()), (size, threshold)
            for wire in (torch.float32, torch.float16, torch.float64):
                left, kept = flat * 1e5, flat * 1e5
                assert torch.equal(kernels_triton.split_selected(left, positions, wire),
                                   topk.split_selected(kept, positions, wire))
                assert torch.equal(left, kept)


def check_amsgrad(dtype, weight_decay, decoupled, maximize):
    from hvd_ext.torch import kernels_triton

    for size in SIZES:
        rng = np.random.default_rng(size)
        weights = torch.nn.Parameter(torch.from_numpy(rng.standard_normal(size)).to(dtype))
        found, before = weights.detach().clone(), weights.detach().double().numpy().copy()
        states = [torch.zeros_like(found) for _ in range(3)]
        oracle = {name: np.zeros(size) for name in ("m", "v", "vhat")}
        optimizer = hvd.AMSGrad([weights], 0.1, weight_decay=weight_decay, eps=1e-6,
                                decoupled_weight_decay=decoupled, maximize=maximize)
        for _ in range(3):
            weights.grad = torch.from_numpy(rng.standard_normal(size)).to(dtype)
            optimizer.step()
            kernels_triton.update_amsgrad(
                found, weights.grad, *states, lr=-0.1, beta1=0.9, fresh1=1 - 0.9, beta2=0.999,
                fresh2=1 - 0.999, eps=1e-6, shrink=1 - 0.1 * weight_decay if decoupled else 1.0,
                decay=0.0 if decoupled else weight_decay, sign=-1.0 if maximize else 1.0)
            torch.testing.assert_close(found, weights.detach())
            if not weight_decay and not maximize:
                before = amsgrad_step(before, weights.grad.double().numpy(), oracle, lr=0.1, beta1=0.9,
                                      beta2=0.999, eps=1e-6)
                np.testing.assert_allclose(found.double(), before, rtol=TOLERANCE[dtype],
                                           atol=TOLERANCE[dtype])


def main():
    for dtype in TOLERANCE:
        for adaptive in (True, False):
            for cumulative in (True, False):
                check_recursion(dtype, adaptive, cumulative)
    print("recursion")
    for dtype in TOLERANCE:
        check_topk(dtype)
    print("topk")
    for dtype in TOLERANCE:
        for options in ((0.0, False, False), (0.1, False, False), (0.1, True, False), (0.0, False, True)):
            check_amsgrad(dtype, *options)
    print("amsgrad")


if __name__ == "__main__":
    main()

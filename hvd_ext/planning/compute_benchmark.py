"""Times what the front ends compute for an exchange; see :class:`hvd_ext.planning.compute_costs.Work`."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hvd_ext.planning.compute_costs import ComputeCosts
from hvd_ext.reducers.buckets import BucketKey, TensorSpec, plan_buckets
from hvd_ext.reducers.delay_compensation import DelayedUpdate
from hvd_ext.reducers.powersgd import plan_matrices
from hvd_ext.reducers.topk import Layout, TopK, keep_count
from hvd_ext.reducers.topk.plan import Segment

MAX_NUMEL = 2**22  # elements: more than a cache holds
TIMED_CALLS = 7
ROWS = 4  # workers of a timed recursion
COLUMNS = 2048


def time_compute(numel: int, ratio: float, rank: int, framework: str,
                 together: Callable[[], None] = lambda: None) -> ComputeCosts:
    """What computing takes on this rank.

    PyTorch's kernels are timed themselves. Without PyTorch passes are NumPy's, and the other figures are
    the defaults in proportion to them.

    Args:
        numel: of the model; at most four million elements are taken.
        ratio: TopK's kept fraction.
        rank: of PowerSGD.
        framework: "torch" or "tensorflow".
        together: called before each timing, to let all ranks begin at the same time.
    """
    numel = max(COLUMNS, min(numel, MAX_NUMEL) // COLUMNS * COLUMNS)

    def nanoseconds_per_element(call: Callable[[], Any], elements: float = numel) -> float:
        taken = []
        for number in range(TIMED_CALLS + 1):
            together()
            began = time.perf_counter()
            call()
            if number:
                taken.append(time.perf_counter() - began)
        return 1e9 * statistics.mean(taken) / elements  # waiting for a shared core is part of it

    if framework == "torch":
        return _time_torch(nanoseconds_per_element, numel, ratio, rank)
    one, other = np.ones(numel, np.float32), np.ones(numel, np.float32)
    passes = (nanoseconds_per_element(lambda: np.copyto(one, other))
              + nanoseconds_per_element(lambda: np.add(one, other, out=other))) / 2
    usual = ComputeCosts()
    return ComputeCosts(**{name: value * passes / usual.pass_ns for name, value in usual.to_dict().items()})


def _time_torch(ns: Callable[..., float], numel: int, ratio: float, rank: int) -> ComputeCosts:
    torch: Any = importlib.import_module("torch")
    topk, delay, low_rank, delayed = (importlib.import_module(f"hvd_ext.torch.reducers.kernels.{name}")
                                      for name in ("topk", "delay_compensation", "powersgd",
                                                   "delayed_update"))
    generator = torch.Generator().manual_seed(0)
    gradient, other, out = (torch.randn(numel, generator=generator) * 0.01 for _ in range(3))
    half = torch.empty(numel, dtype=torch.float16)
    passes = (ns(lambda: out.copy_(gradient)) + ns(lambda: torch.add(gradient, other, out=out))) / 2
    cast = (ns(lambda: half.copy_(gradient)) + ns(lambda: out.copy_(half))) / 2

    settings, k = TopK(ratio), keep_count(numel, ratio)
    layout = Layout(k, settings.values)
    chosen: dict[str, Any] = {}

    def select() -> None:
        torch.linalg.vector_norm(gradient)
        torch.add(gradient, other, out=out)
        positions = topk.select_entries(out, [Segment(0, numel, k)], settings, (0,))
        values = topk.split_selected(out, positions, torch.float32)
        chosen.update(at=positions, values=values, message=topk.pack_message(positions, values, layout))

    select_ns = ns(select)
    mean = torch.zeros(numel)
    scatter = ns(lambda: mean.index_add_(0, chosen["at"], chosen["values"]), chosen["at"].numel())

    rows = list(torch.randn((ROWS, numel // ROWS), generator=generator) * 0.01)
    recursion_rule = delay.Recursion(step=0.01, lam=2.0, adaptive=True, decay=0.95, eps=1e-7, cumulative=True,
                                     divisor=float(ROWS))
    square, reduced = torch.zeros(numel // ROWS), torch.empty(numel // ROWS)
    recursion = ns(lambda: delay.compensated_sum(rows, recursion_rule, square, reduced))

    (bucket,) = plan_buckets([TensorSpec("matrix", (numel // COLUMNS, COLUMNS), 4, BucketKey("float32"))])
    found = plan_matrices(bucket,
                          [TensorSpec("matrix", (numel // COLUMNS, COLUMNS), 4, BucketKey("float32"))], rank)
    q = torch.randn(COLUMNS * found[0].r, generator=generator)

    def products() -> None:
        p = low_rank.left_factors(gradient, q, found)
        low_rank.orthogonalize_columns(p, found)
        low_rank.right_factors(gradient, p, found, torch.empty_like(q))

    product = ns(products) / 2 / found[0].r
    kept, target = torch.zeros(numel), torch.empty(numel)
    rule = DelayedUpdate()
    compensate = ns(lambda: delayed.compensate_gradient(gradient, out, other, kept, rule, 1.0, target))
    parameter = torch.nn.Parameter(torch.zeros(numel))
    parameter.grad = gradient
    update = ns(torch.optim.SGD([parameter], lr=1e-3).step)
    return ComputeCosts(passes, cast, select_ns, scatter, recursion, product, compensate, update)

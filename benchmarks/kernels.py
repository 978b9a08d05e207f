"""Every fused kernel beside the operations that it stands for and beside a copy of the bytes it must touch.

    python -m benchmarks.kernels
    HVD_EXT_KERNELS=triton python -m benchmarks.kernels --device cuda

On the CPU times are this process's CPU time on one thread, so that other programs count for less; on a GPU
they are taken between events. The floor is one copy that reads and writes as many bytes as the kernel must.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import hvd_ext.torch as hvd
from hvd_ext import kernels
from hvd_ext.reducers.delay_compensation.update_rules import BLOCK_NUMEL, AsyncRule, apply_in_blocks
from hvd_ext.reducers.topk import TopK, keep_count
from hvd_ext.reducers.topk.plan import Segment
from hvd_ext.torch.reducers.kernels import topk
from hvd_ext.torch.reducers.kernels.delay_compensation import Recursion, compensated_sum

Call = Callable[[], Any]


def recursion(numel: int, workers: int, adaptive: bool, device: str) -> tuple[Call, int]:
    """The sum of ``workers`` rows, and how many streams of ``numel`` float32 it touches."""
    rows = [torch.randn(numel, device=device) for _ in range(workers)]
    square = torch.zeros(numel, device=device) if adaptive else None
    out = torch.empty(numel, device=device)
    rule = Recursion(step=0.1 / workers, lam=2.0, adaptive=adaptive, decay=0.95, eps=1e-7, cumulative=True,
                     divisor=float(workers))
    return lambda: compensated_sum(rows, rule, square, out), workers + 1 + 2 * adaptive


def amsgrad(numel: int, device: str) -> tuple[Call, int]:
    """An update of 56 tensors: w, m, v, vhat twice, the gradient once."""
    parameters = [torch.nn.Parameter(torch.randn(numel // 56, device=device)) for _ in range(56)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return hvd.AMSGrad(parameters).step, 9


def selection(numel: int, device: str) -> tuple[Call, int]:
    """TopK's positions, one percent."""
    flat = torch.randn(numel, device=device)
    segments = [Segment(0, numel, keep_count(numel, 0.01))]
    return lambda: topk.select_entries(flat, segments, TopK(), (1,)), 1


def server(numel: int, name: str) -> tuple[Call, int]:
    """An update of the parameter server; always on the CPU."""
    rng = np.random.default_rng(0)
    w, gradient, bak, square = (rng.random(numel, dtype=np.float32) for _ in range(4))
    rule, work = AsyncRule(name=name), (np.empty(BLOCK_NUMEL, np.float32), np.empty(BLOCK_NUMEL, np.float32))
    return lambda: apply_in_blocks(rule, w, gradient, lr=1e-6, momentum=0.0, w_bak=bak,
                                   mean_square=square if rule.adaptive else None, velocity=None,
                                   work=work), {"asgd": 4, "dc-asgd-c": 5, "dc-asgd-a": 7}[name]


def milliseconds(call: Call, device: str) -> float:
    """One call."""
    if device == "cpu":
        began = time.process_time()
        call()
        return 1e3 * (time.process_time() - began)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def measure(call: Call, streams: int, numel: int, repeats: int, device: str,
            fused: str) -> dict[str, float]:
    """Medians of the fused kernel, the plain operations and the copy, which take turns."""
    source = torch.ones(numel * streams // 2, device=device)
    target = torch.empty_like(source)
    ways: dict[str, tuple[str, Call]] = {"fused": (fused, call), "plain": ("plain", call),
                                         "copy": ("plain", lambda: target.copy_(source))}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, (choice, made) in ways.items():
            os.environ[kernels.VARIABLE] = choice
            taken = milliseconds(made, device)
            if turn:  # the first compiles
                times[name].append(taken)
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=11_200_000, help="elements, float32")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    fused = kernels.kernel_choice()
    torch.set_num_threads(1)
    made = {"recursion, 2 workers, adaptive": recursion(args.numel // 2, 2, True, args.device),
            "recursion, 2 workers, constant": recursion(args.numel // 2, 2, False, args.device),
            "recursion, 16 workers, adaptive": recursion(args.numel // 16, 16, True, args.device),
            "AMSGrad": amsgrad(args.numel, args.device),
            "TopK's selection, 1 %": selection(args.numel, args.device)}
    sizes = dict.fromkeys(made, args.numel)
    sizes.update({name: args.numel // int(name.split()[1]) for name in made if "workers" in name})
    if args.device == "cpu":
        made |= {f"server's update, {name}": server(args.numel, name)
                 for name in ("asgd", "dc-asgd-c", "dc-asgd-a")}
    table = Table("kernel", "plain ms", "fused ms", "plain / fused", "fused / copy",
                  title=f"{args.numel / 1e6:.1f} M float32, {args.device}, {kernels.VARIABLE}={fused}")
    rows = []
    for name, (call, streams) in made.items():
        found = measure(call, streams, sizes.get(name, args.numel), args.repeats, args.device, fused)
        rows.append({"kernel": name, **found})
        table.add_row(name, f"{found['plain']:.1f}", f"{found['fused']:.1f}",
                      f"{found['plain'] / found['fused']:.2f}", f"{found['fused'] / found['copy']:.2f}")
    Console().print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"numel": args.numel, "device": args.device, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

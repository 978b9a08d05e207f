"""What delay compensation costs beside a plain allreduce, on ranks of this machine's CPU.

    python -m benchmarks.delay_speed --json out/delay_speed.json

"exchange" is the time from the first gradient's readiness to the last reduced gradient, all
gradients of ResNet-18 (11.2 million float32 parameters) being there at once. "step" is a whole
training step of that network on 32 x 32 images. Plain and compensated take turns in one run;
ratios are of medians. Bytes are counted from the messages.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import hvd_ext.torch as hvd
from examples.resnet import resnet18
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.reducers import make_reducer
from hvd_ext.torch.reducers.base import NamedParameter, Reducer
from tests.ranks import run_ranks

BARS = {"exchange": 1.25, "bytes": 1.05, "step": 1.05}
RULES = {"adaptive": hvd.DelayCompensated(), "constant": hvd.DelayCompensated(0.04, adaptive=False)}


def reducer_of(name: str, op: object) -> Reducer:
    """What reduces gradients with ``op=op``."""
    return make_reducer(Collectives(), ReductionOptions(prefix=f"delay.{name}"), op=op,
                        compression=hvd.Compression.none)


def exchange_times(turns: int) -> dict[str, Any]:
    """Seconds of every exchange, and bytes one sends, by way; run on every rank."""
    shapes = [p.shape for p in resnet18(classes=10).parameters()]
    torch.manual_seed(hvd.rank())
    gradients = [torch.randn(shape) for shape in shapes]
    ways = {name: reducer_of(name, op) for name, op in {"plain": hvd.Average, **RULES}.items()}
    entries: dict[str, list[NamedParameter]] = {}
    for name, reducer in ways.items():
        entries[name] = [NamedParameter(f"{name}.{i}", torch.nn.Parameter(torch.zeros(shape)), 0,
                                        lambda: [{"lr": 0.1}])
                         for i, shape in enumerate(shapes)]
        reducer.register_parameters(entries[name])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 2):
        for name, reducer in ways.items():
            for entry, gradient in zip(entries[name], gradients, strict=True):
                entry.parameter.grad = gradient.clone()
            hvd.barrier()
            begin = time.perf_counter()
            for entry in reversed(entries[name]):
                reducer.gradient_ready(entry, 1, 1)
            reducer.finish()
            if turn >= 2:  # the first two are for memory and Horovod's response cache
                seconds[name].append(time.perf_counter() - begin)
            reducer.collectives.traffic.step()
    sent = {name: sum(r.collectives.traffic.last_sent.values()) for name, r in ways.items()}
    return {"seconds": seconds, "sent": sent, "parameters": sum(s.numel() for s in shapes)}


def step_times(turns: int, batch: int) -> dict[str, Any]:
    """Seconds of every training step by way; run on every rank."""
    steps: dict[str, Callable[[], None]] = {}
    for name, op in {"plain": hvd.Average, **RULES}.items():
        steps[name] = make_step(name, op, batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        for name, step in steps.items():
            hvd.barrier()
            begin = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {"seconds": seconds}


def make_step(name: str, op: Any, batch: int) -> Callable[[], None]:
    """A training step of ResNet-18 with momentum SGD."""
    torch.manual_seed(0)
    model = resnet18(classes=10)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), op=op,
        named_parameters=[(f"{name}.{n}", p) for n, p in model.named_parameters()],
    )
    torch.manual_seed(hvd.rank())
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def slowest(results: list[dict[str, Any]]) -> dict[str, float]:
    """Median over turns of the slowest rank's seconds, by way."""
    return {name: median(max(turn) for turn in zip(*(r["seconds"][name] for r in results), strict=True))
            for name in results[0]["seconds"]}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delay_speed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15, help="exchanges measured of each way")
    parser.add_argument("--steps", type=int, default=5, help="training steps measured of each way")
    parser.add_argument("--batch", type=int, default=32, help="images per rank")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    environment = {"HOROVOD_CYCLE_TIME": "1"}  # Horovod's default
    exchanges = run_ranks(exchange_times, args.ranks, args.turns, timeout=300, env=environment)
    steps = run_ranks(step_times, args.ranks, args.steps, args.batch, timeout=600, env=environment)
    plain_bytes = exchanges[0]["sent"]["plain"]
    rows = []
    for what, results in (("exchange", exchanges), ("step", steps)):
        times = slowest(results)
        rows += [{"what": what, "rule": rule, "ms": times[rule] * 1e3, "plain_ms": times["plain"] * 1e3,
                  "ratio": times[rule] / times["plain"], "bar": BARS[what]} for rule in RULES]
    rows += [{"what": "bytes", "rule": rule, "ratio": exchanges[0]["sent"][rule] / plain_bytes,
              "bar": BARS["bytes"]} for rule in RULES]
    table = Table(title=f"Delay compensation against a plain allreduce, {args.ranks} ranks, "
                        f"{exchanges[0]['parameters'] / 1e6:.1f} M parameters")
    for column in ("what", "rule", "ms", "plain ms", "ratio", "at most"):
        table.add_column(column, justify="left" if column in ("what", "rule") else "right")
    for row in rows:
        times = [f"{row[key]:.1f}" if key in row else "" for key in ("ms", "plain_ms")]
        missed = "" if row["ratio"] <= row["bar"] else "  missed"
        table.add_row(row["what"], row["rule"], *times, f"{row['ratio']:.3f}", f"{row['bar']:.2f}{missed}")
    Console().print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"ranks": args.ranks, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

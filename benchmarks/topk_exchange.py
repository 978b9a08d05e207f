"""Exchange of compressed gradients: TopK and PowerSGD beside a dense allreduce and a plain TopK.

    python -m benchmarks.topk_exchange --json out.json

The 11.2 million parameters of a ResNet-18. The baseline is what one writes first: the exact
``torch.topk`` of the flat gradient plus residual, an allgather of indices, an allgather of values,
an addition of each rank's part. It gets its gradient flat and leaves its result flat; the other
rows' times also hold the way from and to each parameter's ``.grad``. All are timed in turn in the
same run, a barrier before each; the time is the slowest rank's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import hvd_ext.torch as hvd
from benchmarks.launch import mpirun, under_mpirun
from examples.resnet import resnet18
from hvd_ext.planning import Cluster, Link, collective_traffic
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.reducers.topk import TopK, keep_count
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.reducers import make_reducer
from hvd_ext.torch.reducers.base import NamedParameter

BASELINE = "torch.topk + allgather"


class Plain:
    """Exact TopK with error feedback and two allgathers, on one flat vector."""

    def __init__(self, numel: int, ratio: float) -> None:
        self.k = keep_count(numel, ratio)
        self.residual = torch.zeros(numel)

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient + self.residual
        _, positions = torch.topk(total.abs(), self.k)
        values = total[positions]
        total[positions] = 0
        self.residual = total
        all_positions = hvd.allgather(positions, name="plain/indices").chunk(hvd.size())
        all_values = hvd.allgather(values, name="plain/values").chunk(hvd.size())
        mean = torch.zeros_like(gradient)
        for where, what in zip(all_positions, all_values, strict=True):
            mean.index_add_(0, where, what)
        return mean / hvd.size()


class Ours:
    """The reducer of a ``compression=``, given one gradient after another as a backward pass would."""

    def __init__(self, entries: list[NamedParameter], config: Any, label: str) -> None:
        self.reducer = make_reducer(Collectives(), ReductionOptions(prefix=label), op=hvd.Average,
                                    compression=config)
        self.reducer.register_parameters(entries)

    def __call__(self) -> None:
        for entry in reversed(self.reducer.entries):
            self.reducer.gradient_ready(entry, 1, 1)
        self.reducer.finish()


def timed(run: Callable[[], Any], set_up: Callable[[], None]) -> float:
    """Milliseconds of the slowest rank."""
    set_up()
    hvd.allreduce(torch.zeros(1), name="barrier")
    began = time.perf_counter()
    run()
    spent = time.perf_counter() - began
    return 1e3 * float(hvd.allreduce(torch.tensor(spent), name="slowest", op=hvd.Max))


def main(argv: list[str] | None = None) -> None:
    """Time all variants in turn; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if not under_mpirun():
        command = mpirun(args.ranks, "benchmarks.topk_exchange", sys.argv[1:] if argv is None else argv)
        raise SystemExit(subprocess.run(command, check=False,
                                        env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)
    hvd.init()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(hvd.rank())
    entries, gradients = [], []
    for number, shape in enumerate(p.shape for p in resnet18(classes=10).parameters()):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        scale = float(torch.rand((), generator=generator)) + 0.1
        gradients.append(torch.randn(shape, generator=generator) * scale)
        parameter.grad = torch.zeros(shape)
        entries.append(NamedParameter(f"p{number}", parameter, 0, lambda: [{}]))
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    numel = flat.numel()

    def set_up() -> None:
        for entry, gradient in zip(entries, gradients, strict=True):
            entry.parameter.grad.copy_(gradient)

    plain = Plain(numel, args.ratio)
    topk = {name: Ours(entries, TopK(args.ratio, selection=name), f"bench_{name}")
            for name in ("exact", "sampled")}
    low_rank = {f"PowerSGD, rank {rank}": Ours(entries, hvd.Compression.powersgd(rank), f"rank{rank}")
                for rank in (1, 4)}
    ours = {"allreduce": Ours(entries, hvd.Compression.none, "bench_dense"), **topk, **low_rank}
    variants: dict[str, Callable[[], Any]] = {BASELINE: lambda: plain(flat), **ours}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.repeats + 2):
        for name, run in variants.items():
            times[name].append(timed(run, set_up))
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}

    sent = {name: sum(variant.reducer.collectives.traffic.sent[kind] for kind in
                      ("values", "indices", "factors", "dense", "gradients")) / (args.repeats + 2)
            for name, variant in ours.items()}
    dense = collective_traffic("allreduce", 4 * numel, Cluster.one_rank_per_host(hvd.size(), Link(10.0))).rank
    figures = {
        "parameters": numel, "ranks": hvd.size(), "ratio": args.ratio,
        "milliseconds": medians,
        "against_baseline": {name: value / medians[BASELINE] for name, value in medians.items()},
        "kept_fraction": {name: variant.reducer.report()["kept_fraction"]
                          for name, variant in topk.items()},
        "ns_per_element": {name: medians[name] * 1e6 / numel for name in ours},
        "sent_bytes": sent, "dense_bytes": dense,
        "sent_of_dense": {name: value / dense for name, value in sent.items()},
    }
    if hvd.rank() == 0:
        show(figures)
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1))


def show(figures: dict[str, Any]) -> None:
    """A table for people."""
    table = Table("exchange", "ms", "against baseline", "sent", title=(
        f"{figures['parameters']:,} parameters, {figures['ranks']} ranks, "
        f"TopK ratio {figures['ratio']:g}"))
    for name, value in figures["milliseconds"].items():
        sent = figures["sent_of_dense"].get(name)
        table.add_row(name, f"{value:.1f}", f"{figures['against_baseline'][name]:.2f}",
                      "" if sent is None else f"{100 * sent:.2f} %")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"sent: bytes per rank, of the {figures['dense_bytes']:,.0f} of a dense allreduce")
    console.print("a whole step took "
                  + ", ".join(f"{name} {value:.1f}" for name, value in figures["ns_per_element"].items())
                  + " ns per element")


if __name__ == "__main__":
    main()

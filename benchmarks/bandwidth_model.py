"""The bandwidth model of ``hvd-ext plan`` against bytes on the wire, and over the number of ranks.

    python -m benchmarks.bandwidth_model --json out.json --plot out.png

Starts 2 and 4 ranks that talk over TCP on the loopback interface only, lets them exchange a made
gradient densely, in half precision and with TopK, and reads the interface's own counter of sent
bytes before and after. Beside it: the bytes that ``optimizer.report()`` counts from its messages,
and the model's. The counter sees TCP and MPI headers and what else uses the interface.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.launch import mpirun
from hvd_ext.planning import Cluster, Link, collective_traffic
from hvd_ext.planning.break_even import AGAINST, break_even_ranks
from hvd_ext.reducers.topk import Layout, keep_count

COUNTER = Path("/sys/class/net/lo/statistics/tx_bytes")
RATIOS = (0.001, 0.01, 0.05)
WAYS = ("dense", "fp16", *(f"topk {ratio:g}" for ratio in RATIOS))
KINDS = ("values", "indices", "dense", "gradients")


def measure(numel: int, steps: int) -> dict[str, Any]:
    """On each rank: bytes of a step by the interface's counter (all ranks) and by the report."""
    import torch

    import hvd_ext.torch as hvd

    hvd.init()
    torch.set_num_threads(1)
    found = {}
    for way in WAYS:
        parameter = torch.nn.Parameter(torch.zeros(numel))
        compression = {"dense": hvd.Compression.none, "fp16": hvd.Compression.fp16}.get(way)
        if compression is None:
            compression = hvd.Compression.topk(float(way.split()[1]))
        # A server that does nothing makes the plain exchanges report their bytes too.
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD([parameter], 0.1), [(way, parameter)],
                                             compression=compression, server="replicated")
        gradient = torch.randn(numel, generator=torch.Generator().manual_seed(hvd.rank()))

        def step(parameter=parameter, gradient=gradient, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            (parameter * gradient).sum().backward()
            optimizer.step()

        step()
        hvd.allreduce(torch.zeros(1), name="ready")
        before = int(COUNTER.read_text())
        hvd.allreduce(torch.zeros(1), name="set")
        for _ in range(steps):
            step()
        hvd.allreduce(torch.zeros(1), name="done")
        wire = (int(COUNTER.read_text()) - before) / steps
        sent = optimizer.report()["sent"]
        found[way] = {"wire": wire / hvd.size(),
                      "reported": sum(sent.get(kind, 0) for kind in KINDS)}
    return found if hvd.rank() == 0 else {}


def model(way: str, numel: int, ranks: int) -> int:
    """The model's bytes out of a rank."""
    cluster = Cluster.one_rank_per_host(ranks, Link(10.0))  # bytes do not depend on the link
    if way.startswith("topk"):
        entries = 4 * Layout(keep_count(numel, float(way.split()[1])), "float32").words
        return round(collective_traffic("allgather", entries, cluster).rank)
    return round(collective_traffic("allreduce", numel * AGAINST[way], cluster).rank)


def start(ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run :func:`measure_cluster` on so many ranks."""
    command = mpirun(
        ranks, "benchmarks.bandwidth_model",
        ["--measure", "--numel", str(args.numel), "--steps", str(args.steps)],
        ["--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo", "--mca", "pml", "ob1"],
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{ranks} ranks failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def plot(path: Path, measured: dict[int, dict[str, Any]], numel: int) -> None:
    """Model's lines over M, relative to dense, and what was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    ranks = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024]
    for way in WAYS:
        shares = [model(way, numel, m) / model("dense", numel, m) for m in ranks]
        (line,) = axes.plot(ranks, shares, label=way)
        axes.scatter(list(measured), [measured[m][way]["wire"] / measured[m]["dense"]["wire"]
                                      for m in measured], color=line.get_color(), s=18)
    axes.set(xscale="log", yscale="log", xlabel="ranks M", ylabel="bytes against dense allreduce",
             title="Lines: model. Dots: measured on the wire.")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--numel", type=int, default=2_000_000)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    if args.measure:
        found = measure(args.numel, args.steps)
        if found:
            print(json.dumps(found), flush=True)
        return
    measured = {ranks: start(ranks, args) for ranks in args.ranks}
    table = Table("ranks", "exchange", "model / kB", "reported / kB", "on the wire / kB",
                  "wire / model", title=f"bytes out of a rank and step, {args.numel:,} parameters")
    for ranks, found in measured.items():
        for way in WAYS:
            expected = model(way, args.numel, ranks)
            table.add_row(str(ranks), way, f"{expected / 1e3:.1f}",
                          f"{found[way]['reported'] / 1e3:.1f}", f"{found[way]['wire'] / 1e3:.1f}",
                          f"{found[way]['wire'] / expected:.3f}")
    Console().print(table)
    for ratio in RATIOS:
        print(f"ratio {ratio:g}: TopK moves fewer bytes than dense below "
              f"{break_even_ranks(ratio, 4)} ranks, than fp16 below "
              f"{break_even_ranks(ratio, 2)}")
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1))
    if args.plot:
        plot(args.plot, measured, args.numel)


if __name__ == "__main__":
    main()

"""Run the benchmarks one after another; their tables go to the terminal, JSON and plots to ``out/``.

    python -m benchmarks                    # all; stop with Ctrl-C, what is done stays in out/
    python -m benchmarks delay_speed seng_step
    python -m benchmarks --list
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Benchmark:
    """A run of a module: what it shows, its arguments, and whether it draws."""

    shows: str
    module: str
    arguments: tuple[str, ...] = ()
    plots: bool = True


BENCHMARKS = {
    "delay_speed": Benchmark("exchange, step and bytes of delay compensation against an allreduce",
                             "delay_speed", plots=False),
    "delay_digits": Benchmark("test error by rule and number of workers", "delay_digits"),
    "kernels": Benchmark("fused kernels against the operations they stand for", "kernels", plots=False),
    "seng_step": Benchmark("cost of a SENG step, one rank", "seng_step", plots=False),
    "seng_step_ranks": Benchmark("cost of a SENG step, block and lagged on two ranks", "seng_step",
                                 ("--ranks", "2"), plots=False),
    "seng_step_small": Benchmark("cost of a SENG step on small layers", "seng_step",
                                 ("--model", "autoencoder", "--subsample", "50"), plots=False),
    "seng_stale": Benchmark("steps to a training loss with older curvature, with and without "
                            "stale_curvature=",
                            "seng_autoencoder", ("--ablation", "--steps", "1000", "--seeds", "1")),
    "seng_scaling": Benchmark("cost of SENG against n, rho, q, r", "seng_scaling", plots=False),
    "seng_autoencoder": Benchmark("steps to a training loss, SENG against SGD and Adam",
                                  "seng_autoencoder"),
    "seng_autoencoder_tensorflow": Benchmark("the same, TensorFlow", "seng_autoencoder",
                                             ("--framework", "tensorflow")),
    "seng_race": Benchmark("time to a target, SENG against five optimizers", "seng_race"),
    "topk_sparse": Benchmark("words of a TopK exchange by number of ranks", "topk_sparse", plots=False),
    "topk_exchange": Benchmark("time and bytes of a TopK exchange", "topk_exchange", plots=False),
    "topk_digits": Benchmark("accuracy of TopK with and without feedback", "topk_digits"),
    "late_accuracy": Benchmark("what a gradient that is one step late costs, two problems", "late_accuracy",
                               plots=False),
    "bandwidth_model": Benchmark("when TopK pays off, and measured bytes", "bandwidth_model"),
    "async_speed": Benchmark("throughput of the parameter server", "async_speed"),
    "async_digits_table": Benchmark("asynchronous methods on the digits", "async_digits", ("table",)),
    "async_digits_lam": Benchmark("influence of lam", "async_digits", ("lam",)),
    "async_digits_momentum": Benchmark("best momentum by number of workers", "async_digits",
                                       ("momentum",)),
    "tf_speed": Benchmark("what the extensions cost under TensorFlow", "tf_speed", plots=False),
    "cluster": Benchmark("exchange and step over 4 hosts at 1 Gbit/s; as root", "cluster", plots=False),
    "simulator": Benchmark("simulated steps on up to 1,024 ranks", "simulator"),
    "simulator_check": Benchmark("the simulator against 2, 4 and 8 hosts; as root", "simulator", plots=False),
    "streaming_pca": Benchmark("momentum against delay, streaming PCA", "streaming_pca"),
}


def main() -> int:
    """Run what was asked for; 1 when any of it failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which; default all", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of JSON and plots")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    console = Console()
    summary = Table(title="Benchmarks")
    for column in ("name", "shows", "" if args.list else "status", "" if args.list else "seconds"):
        if column:
            summary.add_column(column)
    failed = False
    for name in args.names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        if args.list:
            summary.add_row(name, benchmark.shows)
            continue
        console.rule(f"{name}: {benchmark.shows}")
        began = time.monotonic()
        status = run(name, benchmark, args.out)
        failed |= status != 0
        summary.add_row(name, benchmark.shows, "ok" if status == 0 else f"failed ({status})",
                        f"{time.monotonic() - began:.0f}")
    console.print(summary)
    return int(failed)


def run(name: str, benchmark: Benchmark, out: Path) -> int:
    """Run one in a process of its own; its exit status."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{benchmark.module}", *benchmark.arguments,
               "--json", str(out / f"{name}.json")]
    if benchmark.plots:
        command += ["--plot", str(out / f"{name}.png")]
    return subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

"""Test error of large-batch SGD with and without delay compensation, against sequential SGD.

    python -m benchmarks.delay_digits --json out/delay_digits.json --plot out/delay_digits.png

One process; every worker is a micro-batch of 16 digits, so that M workers need no M ranks. Every way
starts from the same weights and sees the same shuffle, ``--seeds`` times; medians are compared,
beside the range and the number of runs that diverged.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import hvd_ext.torch as hvd
from examples.digits import load
from examples.digits_run import parse
from examples.seeds import summarize
from examples.torch_digits import train

WORKERS = (4, 8, 16, 32)
LRS = (0.1, 0.3)
RULES: dict[str, list[str]] = {
    "plain average": [],
    "constant, lam 0.04": ["--op", "delay", "--constant-lam", "--lam", "0.04"],
    "constant, lam 2": ["--op", "delay", "--constant-lam", "--lam", "2"],
    "adaptive, lam 0.5": ["--op", "delay", "--lam", "0.5"],
    "adaptive, lam 1": ["--op", "delay", "--lam", "1"],
    "adaptive, lam 2": ["--op", "delay", "--lam", "2"],
    "adaptive, lam 4": ["--op", "delay", "--lam", "4"],
}


def errors(options: list[str], workers: int, lr: float, seeds: int, epochs: int) -> list[float]:
    """Test error in percent at the end of each seed's run."""
    args = parse("torch_digits", None, [*options, "--virtual-workers", str(workers), "--lr", str(lr),
                                        "--epochs", str(epochs)])
    return [train(args, seed, load(seed), lambda: None)["test_error"] for seed in range(seeds)]


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Error against the number of workers, one panel a learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(LRS), figsize=(11, 4.2), sharey=True)
    for axes, lr in zip(panels, LRS, strict=True):
        for rule in RULES:
            line = [r for r in rows if r["rule"] == rule and r["lr"] == lr]
            axes.plot([r["workers"] for r in line], [r["median"] for r in line], marker="o", label=rule)
        sequential = next(r["median"] for r in rows if r["rule"] == "sequential" and r["lr"] == lr)
        axes.axhline(sequential, color="black", linestyle="--", label="sequential SGD")
        axes.set(xscale="log", yscale="log", xlabel="workers M of batch 16", title=f"lr {lr:g} a worker")
        axes.set_xticks(WORKERS, [str(w) for w in WORKERS])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    panels[0].set_ylabel("test error %")
    panels[-1].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the grid, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delay_digits", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    console = Console()
    grid = [("sequential", [], 1, lr) for lr in LRS]
    grid += [(rule, options, m, lr) for lr in LRS for rule, options in RULES.items() for m in WORKERS]
    rows = []
    for rule, options, workers, lr in track(grid, description="training", console=console):
        found = errors(options, workers, lr, args.seeds, args.epochs)
        rows.append({"rule": rule, "workers": workers, "lr": lr, "median": summarize(found).median,
                     "errors": found})
    for lr in LRS:
        first = next(r["errors"] for r in rows if r["rule"] == "sequential" and r["lr"] == lr)
        table = Table(title=f"Digits, test error %, median (range) of {args.seeds} seeds, lr {lr:g} a "
                            f"worker, {args.epochs} epochs; sequential SGD: {summarize(first)}")
        table.add_column("rule")
        for workers in WORKERS:
            table.add_column(f"M = {workers}", justify="right")
        for rule in RULES:
            line = [r["errors"] for r in rows if r["rule"] == rule and r["lr"] == lr]
            table.add_row(rule, *(str(summarize(found)) for found in line))
        console.print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"seeds": args.seeds, "rows": rows}, indent=1))
    if args.plot:
        plot(args.plot, rows)


if __name__ == "__main__":
    main()

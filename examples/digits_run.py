"""What the digits examples of both front ends share: command line, progress, table, JSON and plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.digits import Digits, load
from examples.seeds import summarize
from hvd_ext.reporting.terminal import make_console

Run = dict[str, Any]
Train = Callable[[argparse.Namespace, int, Digits, Callable[[], None]], Run]


def parse(program: str, description: str | None, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, or ``arguments`` in its place."""
    parser = argparse.ArgumentParser(prog=f"python -m examples.{program}", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--op", choices=["average", "delay", "adasum"], default="average",
        help="how gradients are reduced")
    add("--lam", type=float, default=2.0, help="lam of --op delay (0 and up)")
    add("--constant-lam", action="store_true", help="lam as it is, not divided by MeanSquare's root")
    add("--virtual-workers", type=int, default=None, metavar="M",
        help="mini-batches of 16 in a step; default: one a rank")
    add("--optimizer", choices=["sgd", "momentum", "adam", "amsgrad"], default="sgd")
    add("--compression", choices=["none", "fp16", "topk"], default="none")
    add("--ratio", type=float, default=0.01, help="kept share of --compression topk")
    add("--server", choices=["replicated", "rank0", "sharded"], default=None)
    add("--preconditioner", choices=["none", "seng"], default="none")
    add("--damping", type=float, default=0.3, help="damping of --preconditioner seng")
    add("--update-freq", type=int, default=20, help="steps between SENG's refreshes")
    add("--lr", type=float, default=0.1, help="learning rate of one worker's step")
    add("--epochs", type=int, default=20)
    add("--hidden", type=int, default=64, help="width of the hidden layer")
    add("--seed", type=int, nargs="+", default=[0], help="one run each")
    add("--json", type=Path, help="write the results here")
    add("--plot", type=Path, help="write a PNG of the test error by epoch here")
    add("--quiet", action="store_true", help="no progress bar, no table")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace, train: Train, *, rank: int, size: int) -> None:
    """Call ``train(args, seed, data, epoch_done)`` once a seed; rank 0 reports as asked.

    ``train`` returns at least "test_error" and "test_errors" (by epoch) in percent, "seconds" and
    "workers".
    """
    console = make_console()
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn(), console=console, disable=args.quiet or rank != 0)
    runs = []
    with bar:
        for seed in args.seed:
            task = bar.add_task(f"seed {seed}, epochs", total=args.epochs)
            runs.append(train(args, seed, load(seed), lambda task=task: bar.advance(task)))
    if rank != 0:
        return
    label = describe(args, runs[0]["workers"])
    if not args.quiet:
        console.print(table(runs, f"Digits, {label} of 16 samples on {size} rank(s), "
                                  f"lr {args.lr:g} a worker"))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        options = {k: v if not isinstance(v, Path) else str(v) for k, v in vars(args).items()}
        args.json.write_text(json.dumps({"options": options, "ranks": size, "runs": runs}, indent=1))
    if args.plot:
        plot(args.plot, runs, label)


def describe(args: argparse.Namespace, workers: int) -> str:
    """How gradients are reduced and used: what the command line has chosen, and the number of workers."""
    parts = [f"op={args.op}"]
    if args.compression != "none":
        parts.append(f"compression={args.compression}" + f"({args.ratio:g})" * (args.compression == "topk"))
    if args.preconditioner != "none":
        parts.append(f"preconditioner={args.preconditioner}")
    if args.server is not None:
        parts.append(f"server={args.server}")
    return ", ".join([*parts, f"{workers} workers"])


def table(runs: list[Run], title: str) -> Table:
    """Test error and time of every seed; the median and range of the errors, the sum of the times."""
    made = Table(title=title)
    for column in ("seed", "test error %", "seconds"):
        made.add_column(column, justify="right")
    for one in runs:
        made.add_row(str(one["seed"]), f"{one['test_error']:.1f}", f"{one['seconds']:.1f}")
    if len(runs) > 1:
        errors = summarize([one["test_error"] for one in runs])
        made.add_row("median (range)", str(errors), f"{sum(one['seconds'] for one in runs):.1f}")
    return made


def plot(path: Path, runs: list[Run], title: str) -> None:
    """Test error by epoch, one line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for one in runs:
        axes.plot(range(1, len(one["test_errors"]) + 1), one["test_errors"], label=f"seed {one['seed']}")
    axes.set(xlabel="epoch", ylabel="test error %", title=title, yscale="log")
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""Train a classifier of handwritten digits on any number of ranks, with or without the extensions.

    horovodrun -np 2 python -m examples.torch_digits --op delay --virtual-workers 16

``--lr`` is the learning rate of one worker's step: large batches of M workers take M times as much
(linear scaling), so the same value compares all of them with sequential SGD.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import hvd_ext.torch as hvd
from examples.digits import Deal, Digits, load


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, or ``arguments`` in its place."""
    parser = argparse.ArgumentParser(prog="python -m examples.torch_digits", description=__doc__,
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


def make_model(hidden: int, seed: int) -> torch.nn.Module:
    """64 pixels, one hidden layer, 10 classes."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, hidden), torch.nn.ReLU(),
                               torch.nn.Linear(hidden, 10))


def make_optimizer(args: argparse.Namespace, model: torch.nn.Module, deal: Deal) -> Any:
    """The optimizer of the command line: an ordinary one, and the extensions asked for."""
    # Adaptive steps do not grow with the batch; those of SGD do.
    scaled = args.lr * deal.workers
    inner = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=scaled),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=scaled, momentum=0.9),
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=args.lr),
        "amsgrad": lambda: hvd.AMSGrad(model.parameters(), lr=args.lr),
    }[args.optimizer]()
    op = {
        "average": lambda: hvd.Average,
        "adasum": lambda: hvd.Adasum,
        "delay": lambda: hvd.DelayCompensated(args.lam, adaptive=not args.constant_lam,
                                              virtual_workers="microbatch"),
    }[args.op]()
    compression = {
        "none": lambda: hvd.Compression.none,
        "fp16": lambda: hvd.Compression.fp16,
        "topk": lambda: hvd.Compression.topk(args.ratio),
    }[args.compression]()
    preconditioner = None
    if args.preconditioner == "seng":
        preconditioner = hvd.SENG(model, damping=args.damping, update_freq=args.update_freq)
    return hvd.DistributedOptimizer(
        inner, named_parameters=model.named_parameters(), compression=compression, op=op,
        backward_passes_per_step=deal.passes, preconditioner=preconditioner, server=args.server,
    )


def error_percent(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of wrong answers, in percent; each rank judges its part and the counts are summed."""
    part = slice(hvd.rank(), None, hvd.size())
    with torch.no_grad():
        wrong = (model(x[part]).argmax(1) != y[part]).sum().double()
    return float(hvd.allreduce(wrong, op=hvd.Sum, name="wrong")) * 100 / len(y)


def train(args: argparse.Namespace, seed: int, data: Digits, progress: Progress | None) -> dict[str, Any]:
    """One run. The test error after each epoch, in percent, and the seconds it took."""
    deal = Deal(args.virtual_workers or hvd.size(), hvd.size())
    model = make_model(args.hidden, seed)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = make_optimizer(args, model, deal)
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    test_x, test_y = torch.from_numpy(data.test_x), torch.from_numpy(data.test_y)
    errors = []
    task = None
    if progress is not None:
        task = progress.add_task(f"seed {seed}", total=args.epochs * deal.steps(len(x)))
    started = time.perf_counter()
    for epoch in range(args.epochs):
        for step in torch.from_numpy(deal.microbatches(len(x), epoch, seed, hvd.rank())):
            optimizer.zero_grad()
            for picked in step:
                loss = torch.nn.functional.cross_entropy(model(x[picked]), y[picked])
                (loss / deal.passes).backward()
            optimizer.step()
            if progress is not None and task is not None:
                progress.advance(task)
        errors.append(error_percent(model, test_x, test_y))
        if progress is not None and task is not None:
            progress.update(task, description=f"seed {seed}, test error {errors[-1]:.1f} %")
    return {"seed": seed, "test_error": errors[-1], "test_errors": errors,
            "seconds": time.perf_counter() - started, "workers": deal.workers}


def show(args: argparse.Namespace, runs: list[dict[str, Any]], console: Console) -> None:
    """The table at the end."""
    table = Table(title=f"Digits, op={args.op}, {runs[0]['workers']} workers of 16 samples on "
                        f"{hvd.size()} rank(s), lr {args.lr:g} a worker")
    for column in ("seed", "test error %", "seconds"):
        table.add_column(column, justify="right")
    for run in runs:
        table.add_row(str(run["seed"]), f"{run['test_error']:.1f}", f"{run['seconds']:.1f}")
    if len(runs) > 1:
        mean = statistics.mean(run["test_error"] for run in runs)
        table.add_row("mean", f"{mean:.1f}", f"{sum(run['seconds'] for run in runs):.1f}")
    console.print(table)


def plot(path: Path, runs: list[dict[str, Any]], label: str) -> None:
    """Test error by epoch, one line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for run in runs:
        axes.plot(range(1, len(run["test_errors"]) + 1), run["test_errors"], label=f"seed {run['seed']}")
    axes.set(xlabel="epoch", ylabel="test error %", title=label, yscale="log")
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for; rank 0 reports."""
    args = parse(arguments)
    hvd.init()
    torch.set_num_threads(1)
    first = hvd.rank() == 0
    console = Console()
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn(), console=console, disable=args.quiet or not first)
    runs = []
    with bar:
        for seed in args.seed:
            runs.append(train(args, seed, load(seed), bar if first else None))
    if not first:
        return
    if not args.quiet:
        show(args, runs, console)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        options = {k: v if not isinstance(v, Path) else str(v) for k, v in vars(args).items()}
        args.json.write_text(json.dumps({"options": options, "ranks": hvd.size(), "runs": runs}, indent=1))
    if args.plot:
        plot(args.plot, runs, f"op={args.op}, {runs[0]['workers']} workers")


if __name__ == "__main__":
    main()

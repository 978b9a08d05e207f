"""What the two TensorFlow digits examples share: command line, model, optimizer, table and plot."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import hvd_ext.tensorflow as hvd
from examples.digits import Deal, Digits, load


def parse(program: str, description: str | None,
          arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: the options of ``examples.torch_digits``."""
    parser = argparse.ArgumentParser(prog=f"python -m examples.{program}", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--op", choices=["average", "delay", "adasum"], default="average",
        help="how gradients are reduced (adasum: tf_digits only)")
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


def make_model(hidden: int, seed: int) -> keras.Model:
    """64 pixels, one hidden layer, 10 classes."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((64,)), keras.layers.Dense(hidden, activation="relu"),
                             keras.layers.Dense(10)])


def make_loss() -> keras.losses.Loss:
    """Cross-entropy of logits and labels, the mean over the batch."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_optimizer(args: argparse.Namespace, deal: Deal) -> keras.Optimizer:
    """The ordinary optimizer of the command line."""
    # Adaptive steps do not grow with the batch; those of SGD do.
    scaled = args.lr * deal.workers
    made: dict[str, Callable[[], keras.Optimizer]] = {
        "sgd": lambda: keras.optimizers.SGD(scaled),
        "momentum": lambda: keras.optimizers.SGD(scaled, momentum=0.9),
        "adam": lambda: keras.optimizers.Adam(args.lr),
        "amsgrad": lambda: hvd.AMSGrad(args.lr),
    }
    return made[args.optimizer]()


def extensions(args: argparse.Namespace, microbatch: bool) -> dict[str, Any]:
    """``op`` and ``compression`` of the command line."""
    op: dict[str, Callable[[], Any]] = {
        "average": lambda: hvd.Average,
        "adasum": lambda: hvd.Adasum,
        "delay": lambda: hvd.DelayCompensated(
            args.lam, adaptive=not args.constant_lam,
            virtual_workers="microbatch" if microbatch else "rank"),
    }
    compression: dict[str, Callable[[], Any]] = {
        "none": lambda: hvd.Compression.none,
        "fp16": lambda: hvd.Compression.fp16,
        "topk": lambda: hvd.Compression.topk(args.ratio),
    }
    return {"op": op[args.op](), "compression": compression[args.compression]()}


def preconditioner(args: argparse.Namespace, model: keras.Model) -> Any:
    """SENG for ``model`` when the command line asks for it."""
    if args.preconditioner == "none":
        return None
    return hvd.SENG(model, damping=args.damping, update_freq=args.update_freq)


def distribute(args: argparse.Namespace, model: keras.Model, deal: Deal) -> keras.Optimizer:
    """The optimizer with its gradients reduced, after the micro-batches of a step."""
    return hvd.DistributedOptimizer(
        make_optimizer(args, deal), backward_passes_per_step=deal.passes,
        average_aggregated_gradients=True, server=args.server, preconditioner=preconditioner(args, model),
        **extensions(args, microbatch=deal.passes > 1))


def error_percent(model: keras.Model, data: Digits) -> float:
    """Share of wrong answers, in percent; each rank judges its part and the counts are summed."""
    part = slice(hvd.rank(), None, hvd.size())
    answers = np.argmax(model(tf.constant(data.test_x[part])), axis=1)
    wrong = tf.constant(float((answers != data.test_y[part]).sum()), tf.float64)
    return float(hvd.allreduce(wrong, op=hvd.Sum, name="wrong")) * 100 / len(data.test_y)


def main(program: str, description: str | None,
         train: Callable[[argparse.Namespace, int, Digits, Callable[[], None]], dict[str, Any]],
         arguments: list[str] | None = None) -> None:
    """Run ``train`` once a seed; rank 0 shows a progress bar, a table, and writes what was asked."""
    args = parse(program, description, arguments)
    hvd.init()
    first = hvd.rank() == 0
    console = Console()
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn(), console=console, disable=args.quiet or not first)
    runs = []
    with bar:
        for seed in args.seed:
            task = bar.add_task(f"seed {seed}, epochs", total=args.epochs)
            runs.append(train(args, seed, load(seed), lambda task=task: bar.advance(task)))
    if not first:
        return
    label = f"op={args.op}, {runs[0]['workers']} workers"
    if not args.quiet:
        console.print(table(runs, f"Digits, {label} of 16 samples on {hvd.size()} rank(s), "
                                  f"lr {args.lr:g} a worker"))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        options = {k: v if not isinstance(v, Path) else str(v) for k, v in vars(args).items()}
        args.json.write_text(json.dumps({"options": options, "ranks": hvd.size(), "runs": runs},
                                        indent=1))
    if args.plot:
        plot(args.plot, runs, label)


def table(runs: list[dict[str, Any]], title: str) -> Table:
    """Test error and seconds of each run, and the mean."""
    shown = Table(title=title)
    for column in ("seed", "test error %", "seconds"):
        shown.add_column(column, justify="right")
    for run in runs:
        shown.add_row(str(run["seed"]), f"{run['test_error']:.1f}", f"{run['seconds']:.1f}")
    if len(runs) > 1:
        mean = statistics.mean(run["test_error"] for run in runs)
        shown.add_row("mean", f"{mean:.1f}", f"{sum(run['seconds'] for run in runs):.1f}")
    return shown


def plot(path: Path, runs: list[dict[str, Any]], label: str) -> None:
    """Test error by epoch, one line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for run in runs:
        axes.plot(range(1, len(run["test_errors"]) + 1), run["test_errors"],
                  label=f"seed {run['seed']}")
    axes.set(xlabel="epoch", ylabel="test error %", title=label, yscale="log")
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

"""What ``make demo`` shows: delay compensation keeps what plain large-batch SGD loses.

Trains the digits on two ranks through ``horovodrun``, three ways at the same learning rate per
worker, and prints the test errors side by side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.seeds import DIVERGED, summarize

EXAMPLES = {"torch": "examples.torch_digits", "tensorflow": "examples.tf_digits"}
WAYS = {
    "sequential SGD": ["--op", "average", "--virtual-workers", "1"],
    "plain large batch, 16 workers": ["--op", "average", "--virtual-workers", "16"],
    "delay-compensated, 16 workers": ["--op", "delay", "--virtual-workers", "16"],
}


def run(example: str, options: list[str], out: Path, ranks: int) -> list[list[float]]:
    """Train once per seed on the ranks; the test errors in percent by epoch."""
    launcher = Path(sys.executable).with_name("horovodrun")
    command = [str(launcher), "--gloo", "-np", str(ranks), sys.executable, "-m", example, *options,
               "--quiet", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed with status {done.returncode}:\n"
                         f"{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [result["test_errors"] for result in json.loads(out.read_text())["runs"]]


def plot(path: Path, curves: dict[str, list[list[float]]], title: str) -> None:
    """Median test error by epoch, with the range over seeds; a dotted line for each run that diverged."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hvd-ext"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.2))
    for way, runs in curves.items():
        by_epoch = list(zip(*runs, strict=True))
        epochs = range(1, len(by_epoch) + 1)
        end = summarize([errors[-1] for errors in runs])
        (line,) = axes.plot(epochs, [statistics.median(errors) for errors in by_epoch],
                            label=f"{way}: {end}")
        axes.fill_between(epochs, list(map(min, by_epoch)), list(map(max, by_epoch)), alpha=0.15)
        for errors in runs:
            if not errors[-1] <= DIVERGED:
                axes.plot(epochs, errors, color=line.get_color(), linewidth=0.7, linestyle=":")
    axes.set(xlabel="epoch", ylabel="test error %", title=title, yscale="log",
             xticks=range(0, len(by_epoch) + 1, 5))
    axes.set_yticks([2, 5, 10, 20, 50, 90], ["2", "5", "10", "20", "50", "90"], minor=False)
    axes.minorticks_off()
    axes.legend(fontsize=7, title="at the end: median (range)", title_fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    """Run the three ways and print the table."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=list(EXAMPLES), default="torch")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5, help="runs per way")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of one worker's step")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--plot", type=Path, help="write the curves here, as .svg or .png")
    args = parser.parse_args()
    console = Console()
    title = (f"Handwritten digits on {args.ranks} ranks ({args.framework}), batch 16 per worker, "
             f"lr {args.lr:g} per worker, {args.epochs} epochs")
    table, curves = Table(title=title), {}
    table.add_column("way")
    table.add_column("test error %, median (range)", justify="right")
    table.add_column(f"each of {args.seeds} seeds", justify="right")
    common = ["--lr", str(args.lr), "--epochs", str(args.epochs),
              "--seed", *map(str, range(args.seeds))]
    with tempfile.TemporaryDirectory() as folder:
        for way, options in WAYS.items():
            with console.status(f"training: {way}"):
                curves[way] = run(EXAMPLES[args.framework], options + common,
                                  Path(folder) / "out.json", args.ranks)
            errors = [by_epoch[-1] for by_epoch in curves[way]]
            table.add_row(way, str(summarize(errors)),
                          "  ".join(f"{error:.1f}" for error in errors))
    console.print(table)
    if args.plot:
        plot(args.plot, curves, f"Handwritten digits, median and range of {args.seeds} seeds")


if __name__ == "__main__":
    main()

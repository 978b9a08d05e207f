"""What ``make demo`` shows: delay compensation keeps what plain large-batch SGD loses.

Trains the digits on two ranks through ``horovodrun``, three ways at the same learning rate a
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

EXAMPLES = {"torch": "examples.torch_digits", "tensorflow": "examples.tf_digits"}
WAYS = {
    "sequential SGD": ["--op", "average", "--virtual-workers", "1"],
    "plain large batch, 16 workers": ["--op", "average", "--virtual-workers", "16"],
    "delay-compensated, 16 workers": ["--op", "delay", "--virtual-workers", "16"],
}


def run(example: str, options: list[str], out: Path, ranks: int) -> list[float]:
    """Train once a seed on the ranks; the final test errors in percent."""
    launcher = Path(sys.executable).with_name("horovodrun")
    command = [str(launcher), "--gloo", "-np", str(ranks), sys.executable, "-m", example, *options,
               "--quiet", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed with status {done.returncode}:\n"
                         f"{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [result["test_error"] for result in json.loads(out.read_text())["runs"]]


def main() -> None:
    """Run the three ways and print the table."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=list(EXAMPLES), default="torch")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each way")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of one worker's step")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    console = Console()
    table = Table(title=f"Handwritten digits on {args.ranks} ranks ({args.framework}), batch 16 a "
                        f"worker, lr {args.lr:g} a worker, {args.epochs} epochs")
    table.add_column("way")
    table.add_column("test error %, mean", justify="right")
    table.add_column(f"each of {args.seeds} seeds", justify="right")
    common = ["--lr", str(args.lr), "--epochs", str(args.epochs),
              "--seed", *map(str, range(args.seeds))]
    with tempfile.TemporaryDirectory() as folder:
        for way, options in WAYS.items():
            with console.status(f"training: {way}"):
                errors = run(EXAMPLES[args.framework], options + common, Path(folder) / "out.json",
                             args.ranks)
            table.add_row(way, f"{statistics.mean(errors):.1f}",
                          "  ".join(f"{error:.1f}" for error in errors))
    console.print(table)


if __name__ == "__main__":
    main()

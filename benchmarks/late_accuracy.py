"""What a gradient that is one step late costs: ``overlap=hvd.DelayedUpdate(...)`` against synchronous SGD,
two problems.

    python -m benchmarks.late_accuracy --json out/late_accuracy.json

One process; a step's gradient is that of the joined batch of 8 workers with 16 samples each, which is what
ranks reduce. Digits: a perceptron with one hidden layer, test error after 20 epochs. Autoencoder: eight
layers, training loss after 200 steps. Every way starts from the same weights and sees the same batches;
medians over ``--seeds`` runs. A run whose loss is not finite at the end, or above its start, counts as
diverged.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import hvd_ext.torch as hvd
from benchmarks.autoencoder_torch import autoencoder
from examples.digits import load

BATCH = 8 * 16
EPOCHS, STEPS = 20, 200
MOMENTUM = 0.9
WAYS: dict[str, Any] = {
    "synchronous": None,
    "late, lam 0": hvd.DelayedUpdate(0.0),
    "late, constant lam 2": hvd.DelayedUpdate(2.0, adaptive=False),
    "late, adaptive lam 0.5": hvd.DelayedUpdate(0.5),
    "late, adaptive lam 2": hvd.DelayedUpdate(2.0),
}


@dataclass(frozen=True)
class Problem:
    """A training, and which learning rates of a step are tried, by momentum."""

    name: str
    unit: str
    lrs: dict[float, tuple[float, ...]]
    run: Callable[[int, Callable[[Sequence[nn.Parameter]], Any]], float | None]


def batches(rng: np.random.Generator, samples: int, steps: int) -> Any:
    """Rows of each step, in a new order each epoch."""
    per_epoch = samples // BATCH
    for step in range(steps):
        if step % per_epoch == 0:
            order = rng.permutation(samples)
        place = step % per_epoch
        yield order[place * BATCH:(place + 1) * BATCH]


def train(model: nn.Module, optimizer: Any, loss_of: Callable[[Any], torch.Tensor], rows: Any) -> None:
    """One step for each batch, and the update that is left."""
    for picked in rows:
        optimizer.zero_grad()
        loss_of(picked).backward()
        optimizer.step()
    optimizer.flush()


def digits(seed: int, optimize: Callable[[Sequence[nn.Parameter]], Any]) -> float | None:
    """Test error in percent."""
    data = load(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)

    def loss_of(picked: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(x[picked]), y[picked])

    everything = slice(None)
    start = float(loss_of(everything).detach())
    train(model, optimize(list(model.parameters())), loss_of,
          batches(np.random.default_rng([seed, 1]), len(x), EPOCHS * (len(x) // BATCH)))
    with torch.no_grad():
        end = float(loss_of(everything))
        wrong = model(torch.from_numpy(data.test_x)).argmax(1).numpy() != data.test_y
    return 100 * float(wrong.mean()) if np.isfinite(end) and end < start else None


def reconstruction(seed: int, optimize: Callable[[Sequence[nn.Parameter]], Any]) -> float | None:
    """Training loss over all samples."""
    x = torch.from_numpy(load(0, 0.2).train_x)
    model = autoencoder(seed)

    def loss_of(picked: Any) -> torch.Tensor:
        return 0.5 * (model(x[picked]) - x[picked]).square().sum() / len(x[picked])

    start = float(loss_of(slice(None)).detach())
    train(model, optimize(list(model.parameters())), loss_of,
          batches(np.random.default_rng([seed, 1]), len(x), STEPS))
    with torch.no_grad():
        end = float(loss_of(slice(None)))
    return end if np.isfinite(end) and end < start else None


PROBLEMS = (
    Problem("digits", "test error %", {0.0: (0.4, 0.8, 1.2), MOMENTUM: (0.02, 0.06, 0.15)}, digits),
    Problem("autoencoder", "training loss", {0.0: (0.03, 0.1, 0.2), MOMENTUM: (0.003, 0.01, 0.02)},
            reconstruction),
)


def measure(problem: Problem, late: Any, lr: float, momentum: float, seeds: int) -> list[float | None]:
    """The result of each seed's run; None where it diverged."""
    def optimize(parameters: Sequence[nn.Parameter]) -> Any:
        return hvd.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=lr, momentum=momentum),
            named_parameters=[(str(number), one) for number, one in enumerate(parameters)], overlap=late)

    return [problem.run(seed, optimize) for seed in range(seeds)]


def told(found: list[float | None]) -> str:
    """Median and range of the runs that did not diverge, and how many did."""
    ended = [one for one in found if one is not None]
    gone = f"{len(found) - len(ended)} of {len(found)} diverged" if len(ended) < len(found) else ""
    if not ended:
        return gone
    return f"{median(ended):.3g} ({min(ended):.3g} to {max(ended):.3g}{'; ' * bool(gone)}{gone})"


def main() -> None:
    """Run the grid, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.late_accuracy", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    console = Console()
    # A synchronous gradient is applied when the next one is taken: a delay of 1 is then one of 2.
    lowered = hvd.momentum_for_delay(2, momentum=MOMENTUM)
    grid = [(problem, way, momentum, used, lr)
            for problem in PROBLEMS for momentum, lrs in problem.lrs.items()
            for used in dict.fromkeys((momentum, lowered if momentum else momentum))
            for way in WAYS if used == momentum or way != "synchronous" for lr in lrs]
    rows = [{"problem": problem.name, "way": way, "momentum": used, "of": momentum, "lr": lr,
             "found": measure(problem, WAYS[way], lr, used, args.seeds)}
            for problem, way, momentum, used, lr in track(grid, description="training", console=console)]
    for problem in PROBLEMS:
        for momentum, lrs in problem.lrs.items():
            table = Table("way", "momentum", *(f"lr {lr:g}" for lr in lrs),
                          title=f"{problem.name}, {problem.unit}, median (range) of {args.seeds} seeds")
            own = [row for row in rows if row["problem"] == problem.name and row["of"] == momentum]
            for way, used in dict.fromkeys((row["way"], row["momentum"]) for row in own):
                cells = [row["found"] for row in own if (row["way"], row["momentum"]) == (way, used)]
                table.add_row(way, f"{used:.3g}", *map(told, cells))
            console.print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"seeds": args.seeds, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

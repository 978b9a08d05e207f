"""Momentum against delay on streaming PCA: Async-MSGD Figure 1.

    python -m benchmarks.streaming_pca --json out.json --plot out.png

Async-MSGD eq. 2.1 with d = 4, Sigma = diag(4, 3, 2, 1), lr = 0.0005, started at the saddle e_2,
100 runs for each momentum and delay, all of them at once in the delay engine. The error of a run
is the mean of 1 - cos^2(w, e_1) over the last third of its updates.

Criterion: the optimal delay of a momentum is the largest delay on the grid up to which (it and all
smaller ones) the mean error stays within ``--tolerance`` times the error without delay. The
default grid holds the paper's delays and the next clearly larger one of each; ``--grid`` gives
another one, for a finer reading.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hvd_ext.reducers.delay_compensation.engine import replay
from hvd_ext.reducers.delay_compensation.sequences import Constant

MOMENTA = (0.7, 0.8, 0.85, 0.9, 0.95)
GRID = (0, 5, 10, 20, 30, 45, 60, 80, 90, 120, 160)
PAPER = {0.7: 120, 0.8: 80, 0.85: 60, 0.9: 30, 0.95: 10}
LR = 0.0005
SCALES = np.sqrt(np.array([4.0, 3.0, 2.0, 1.0]))


def measure(
    grid: list[int], *, steps: int, runs: int, seed: int, curve_every: int
) -> dict[str, Any]:
    """Every momentum and delay at once; the same data stream for each of them.

    Returns the errors (momenta, delays, runs), the curves (momenta, delays, observations) of the
    mean error and the updates at which they were observed.
    """
    rng = np.random.default_rng(seed)
    cells = len(MOMENTA) * len(grid)
    start = np.zeros((cells * runs, 4))
    start[:, 1] = 1.0
    momentum = np.repeat(np.asarray(MOMENTA), len(grid) * runs)[:, None]
    constants = [Constant(delay) for delay in grid]
    delays = [constants[d] for _ in MOMENTA for d in range(len(grid)) for _ in range(runs)]
    last = np.zeros(cells * runs)

    def gradient(v: np.ndarray, k: int) -> np.ndarray:
        x = rng.standard_normal((1, runs, 4)) * SCALES
        v = v.reshape(cells, runs, 4)
        along = (x * v).sum(axis=2, keepdims=True)
        return (v * along**2 - x * along).reshape(-1, 4)  # minus Async-MSGD eq. 2.1's direction

    def observe(v: np.ndarray, k: int) -> np.ndarray | None:
        nonlocal last
        norm = np.square(v).sum(axis=1)
        error = np.where(np.isfinite(norm), 1.0 - np.square(v[:, 0]) / norm, 1.0)
        error = np.nan_to_num(error, nan=1.0)
        if k > steps - steps // 3:
            last += error
        return error.reshape(cells, runs).mean(axis=1) if k % curve_every == 0 else None

    # every 10th update is enough for a mean over thousands of them
    run = replay(gradient, start, steps=steps, delays=delays, lr=LR, momentum=momentum,
                 observe=observe, observe_every=10)
    kept = [i for i, value in enumerate(run.observed) if value is not None]
    taken = sum(k > steps - steps // 3 for k in run.observed_at)
    shape = (len(MOMENTA), len(grid))
    return {
        "errors": (last / taken).reshape(*shape, runs),
        "curves": np.stack([run.observed[i] for i in kept], axis=1).reshape(*shape, -1),
        "updates": [run.observed_at[i] for i in kept],
    }


def optimal_delays(grid: list[int], errors: np.ndarray, tolerance: float) -> dict[float, int]:
    """The largest delay of the grid up to which the error holds, by momentum."""
    best = {}
    for m, mu in enumerate(MOMENTA):
        means = errors[m].mean(axis=1)
        lost = np.flatnonzero(means > tolerance * means[0])
        best[mu] = grid[(int(lost[0]) if lost.size else len(grid)) - 1]
    return best


def ruled_delay(momentum: float, best: dict[float, int]) -> int:
    """The delay at which ``momentum_for_delay`` gives ``momentum``, from the pair at 0.9."""
    return round(best[0.9] * ((1 - momentum) / (1 - 0.9)) ** 2)


def table(grid: list[int], result: dict[str, Any], best: dict[float, int]) -> Table:
    """Errors in 1e-3 by delay and momentum, those at the optimal delay in bold."""
    shown = Table(title="streaming PCA: mean error (1e-3) over the last third of the updates")
    shown.add_column("delay", justify="right")
    for mu in MOMENTA:
        shown.add_column(f"mu = {mu}", justify="right")
    means = result["errors"].mean(axis=2) * 1e3
    for d, delay in enumerate(grid):
        shown.add_row(str(delay), *(
            f"[bold]{means[m, d]:.2f}[/]" if delay == best[mu] else f"{means[m, d]:.2f}"
            for m, mu in enumerate(MOMENTA)))
    shown.add_section()
    shown.add_row("optimal", *(f"[bold]{best[mu]}[/]" for mu in MOMENTA))
    shown.add_row("paper", *(str(PAPER[mu]) for mu in MOMENTA))
    shown.add_row("rule from 0.9", *(str(ruled_delay(mu, best)) for mu in MOMENTA))
    return shown


def plot(path: Path, grid: list[int], result: dict[str, Any], best: dict[float, int]) -> None:
    """The mean error with its standard deviation over runs, by delay, one line a momentum."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for m, mu in enumerate(MOMENTA):
        means, spread = result["errors"][m].mean(axis=1), result["errors"][m].std(axis=1)
        line = axes.plot(grid, means, marker="o", ms=3, label=f"mu = {mu}")[0]
        axes.fill_between(grid, means - spread, means + spread, color=line.get_color(), alpha=0.2)
        axes.axvline(best[mu], color=line.get_color(), ls=":", lw=1)
    axes.set(xlabel="delay (updates)", ylabel="1 - cos²(w, e₁)", yscale="log",
             title="optimal delay (dotted) falls as momentum rises")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what goes into the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=30_000, help="updates a run")
    parser.add_argument("--runs", type=int, default=100, help="runs for each momentum and delay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=2.0,
                        help="the error holds within this factor of the one without delay")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="write the plot here")
    parser.add_argument("--grid", type=int, nargs="+", default=list(GRID),
                        help="delays to try, in updates; 0 is always among them")
    options = parser.parse_args(arguments)
    grid = sorted({0, *options.grid})
    began = time.perf_counter()
    result = measure(grid, steps=options.steps, runs=options.runs, seed=options.seed,
                     curve_every=300)
    best = optimal_delays(grid, result["errors"], options.tolerance)
    console = Console()
    console.print(table(grid, result, best))
    console.print(f"{time.perf_counter() - began:.0f} s; holds within {options.tolerance} x the "
                  "error without delay")
    summary = {
        "benchmark": "streaming_pca", "lr": LR, "steps": options.steps, "runs": options.runs,
        "seed": options.seed, "tolerance": options.tolerance, "delays": grid,
        "optimal_delay": {str(mu): best[mu] for mu in MOMENTA},
        "rule_from_0.9": {str(mu): ruled_delay(mu, best) for mu in MOMENTA},
        "paper": {str(mu): PAPER[mu] for mu in MOMENTA},
        "error_mean": {str(mu): result["errors"][m].mean(axis=1).tolist()
                       for m, mu in enumerate(MOMENTA)},
        "error_std": {str(mu): result["errors"][m].std(axis=1).tolist()
                      for m, mu in enumerate(MOMENTA)},
        "curves": {str(mu): {str(d): result["curves"][m, i].tolist() for i, d in enumerate(grid)}
                   for m, mu in enumerate(MOMENTA)},
        "updates": result["updates"],
    }
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1))
    if options.plot:
        plot(options.plot, grid, result, best)
    return summary


if __name__ == "__main__":
    main()

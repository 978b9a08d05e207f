"""Asynchronous SGD on the digits: the order of DC-ASGD Table 1, its section G, Async-MSGD Figure 2.

    python -m benchmarks.async_digits table --json table.json --plot table.png
    python -m benchmarks.async_digits lam --json lam.json --plot lam.png
    python -m benchmarks.async_digits momentum --json momentum.json --plot momentum.png

One process, the delay engine: M workers whose computing times vary by 20 % (``Simulated``), a
64-32-10 network, mini-batches of 8, 20 epochs of the whole training set whatever M (10 for
``momentum``), constant learning rate after a linear warm-up over the first two epochs, the same for
every method. All learning rates and seeds of a method are computed at once. Each method is tuned
over the grid below: the setting with the lowest mean test error, so that a run that diverges counts. What is
shown of it is the median and the range over the seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.cifar10 import cifar10
from benchmarks.digits_mlp import Data, Network, digits
from examples.seeds import summarize
from hvd_ext.reducers.delay_compensation.engine import replay
from hvd_ext.reducers.delay_compensation.sequences import Simulated
from hvd_ext.reducers.delay_compensation.update_rules import AsyncRule

RATES = (0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
WORKERS = (4, 8, 16)
LAMS = {"dc-asgd-c": ((0.5, 0.0), (2.0, 0.0), (8.0, 0.0)),  # (lam, decay)
        "dc-asgd-a": ((1.0, 0.95), (2.0, 0.95), (2.0, 0.0), (4.0, 0.0))}
MOMENTA = (0.1, 0.3, 0.5, 0.7, 0.9)
MOMENTUM_LR = 0.04
WARM_UP = 2  # epochs


class Bench:
    """The task with one row of the network for each learning rate and seed."""

    def __init__(self, data: Data, *, rates: tuple[float, ...], seeds: int, epochs: int) -> None:
        self.rates, self.seeds = rates, seeds
        runs = [seed for _ in rates for seed in range(seeds)]
        self.net = Network(data, hidden=32, batch=8, seeds=runs)
        self.lr = np.repeat(np.asarray(rates, np.float32), seeds)[:, None]
        self.draws = self.net.batches * epochs

    def lr_at(self, share: float) -> np.ndarray:
        """The learning rates (R, 1) after a share of all samples."""
        epoch = share * self.draws / self.net.batches
        return self.lr * np.float32(min(1.0, (epoch + 1 / self.net.batches) / WARM_UP))

    def by_rate(self, w: np.ndarray) -> np.ndarray:
        """Test error by learning rate and seed (rates, seeds), in percent."""
        return self.net.errors(w).reshape(len(self.rates), self.seeds)

    def asynchronous(self, workers: int, rule: AsyncRule, momentum: float = 0.0) -> np.ndarray:
        """One gradient a mini-batch, each applied as late as ``workers`` make it."""
        run = replay(
            self.net.gradient, self.net.start(), steps=self.draws, rule=rule, momentum=momentum,
            delays=Simulated(workers, 0.2 if workers > 1 else 0.0, seed=workers),
            lr=lambda k: self.lr_at(k / self.draws),
        )
        return self.by_rate(run.weights)

    def synchronous(self, workers: int) -> np.ndarray:
        """One update of the mean of M gradients for every M mini-batches.

        The learning rates are M times those of the network's rows (linear scaling).
        """
        def gradient(w: np.ndarray, k: int) -> np.ndarray:
            total = self.net.gradient(w, k * workers)
            for m in range(1, workers):
                total += self.net.gradient(w, k * workers + m)
            return total / np.float32(workers)

        steps = self.draws // workers
        run = replay(gradient, self.net.start(), steps=steps,
                     lr=lambda k: self.lr_at(k / steps) * np.float32(workers))
        return self.by_rate(run.weights)


def best(errors: np.ndarray, rates: tuple[float, ...]) -> dict[str, Any]:
    """The setting with the lowest mean error: its median, errors by seed, rate and all means."""
    means = errors.mean(axis=1)
    at = int(means.argmin())
    return {"error": float(np.median(errors[at])), "errors": errors[at].tolist(), "mean": float(means[at]),
            "lr": rates[at], "by_lr": means.tolist()}


def table(data: Data, seeds: int, epochs: int, say: Callable[[str], None]) -> dict[str, Any]:
    """DC-ASGD Table 1: sequential, SSGD, ASGD, DC-ASGD-c and -a for each number of workers."""
    bench = Bench(data, rates=RATES, seeds=seeds, epochs=epochs)
    rows = [{"workers": 1, "method": "SGD",
             **best(bench.asynchronous(1, AsyncRule(name="asgd")), RATES)}]
    for workers in WORKERS:
        say(f"{workers} workers")
        # the same learning rates as the others, and linearly scaled ones
        scaled = tuple(sorted({rate / workers for rate in RATES} | set(RATES[:4])))
        sync = Bench(data, rates=scaled, seeds=seeds, epochs=epochs)
        rows.append({"workers": workers, "method": "SSGD",
                     **best(sync.synchronous(workers), tuple(r * workers for r in scaled))})
        rows.append({"workers": workers, "method": "ASGD",
                     **best(bench.asynchronous(workers, AsyncRule(name="asgd")), RATES)})
        for name, settings in LAMS.items():
            tried = [
                {**best(bench.asynchronous(workers, AsyncRule(name=name, lam=lam, decay=decay)),
                        RATES), "lam": lam, "decay": decay}
                for lam, decay in settings
            ]
            chosen = min(tried, key=lambda entry: entry["mean"])
            rows.append({"workers": workers, "method": name.upper().replace("-C", "-c")
                         .replace("SGD-A", "SGD-a"), **chosen, "tried": tried})
    return {"rows": rows}


def influence_of_lam(data: Data, seeds: int, epochs: int,
                     say: Callable[[str], None]) -> dict[str, Any]:
    """DC-ASGD section G: DC-ASGD-a at the lr that suits sequential SGD, lam from far too small to
    far too large."""
    rates = (0.2,)
    bench = Bench(data, rates=rates, seeds=seeds, epochs=epochs)
    lams = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 10.0, 30.0)
    errors = {}
    for lam in lams:
        say(f"lam {lam:g}")
        rule = AsyncRule(name="dc-asgd-a", lam=lam, decay=0.95)
        errors[str(lam)] = bench.asynchronous(8, rule)[0].tolist()
    sequential = bench.asynchronous(1, AsyncRule(name="asgd"))[0].tolist()
    return {"workers": 8, "lr": rates[0], "errors": errors, "sequential": sequential}


def momentum_by_workers(data: Data, seeds: int, epochs: int,
                        say: Callable[[str], None]) -> dict[str, Any]:
    """Async-MSGD Figure 2: the error by momentum for 1 to 16 workers at one learning rate, one
    at which a single worker does best with momentum 0.9."""
    rates = (MOMENTUM_LR,)
    bench = Bench(data, rates=rates, seeds=seeds, epochs=epochs)
    found: dict[str, Any] = {}
    for workers in (1, 2, 4, 8, 16):
        say(f"{workers} workers")
        found[str(workers)] = {
            str(mu): bench.asynchronous(workers, AsyncRule(name="asgd"), mu)[0].tolist()
            for mu in MOMENTA
        }
    return {"rate": rates[0], "errors": found}


def shown(name: str, results: dict[str, Any]) -> Table:
    """The result as a table."""
    if name == "table":
        made = Table("workers", "method", "error (%)", "lr", "lam", "decay",
                     title="test error after tuning, median (range) of the seeds")
        for row in results["rows"]:
            made.add_row(str(row["workers"]), row["method"],
                         summarize(row["errors"]).describe(2), f"{row['lr']:.4g}",
                         f"{row.get('lam', '')}", f"{row.get('decay', '')}")
    elif name == "lam":
        made = Table("lam", "error (%), median (range)",
                     title=f"DC-ASGD-a, {results['workers']} workers, lr {results['lr']}")
        made.add_row("sequential SGD", summarize(results["sequential"]).describe(2))
        for lam, errors in results["errors"].items():
            made.add_row("0 (ASGD)" if lam == "0.0" else lam, summarize(errors).describe(2))
    else:
        made = Table("workers", *map(str, MOMENTA), "best momentum",
                     title="error (%) by momentum, median (range)")
        for workers, by_mu in results["errors"].items():
            found = {mu: summarize(errors) for mu, errors in by_mu.items()}
            made.add_row(workers, *(one.describe(2) for one in found.values()),
                         min(found, key=lambda mu: found[mu].median))
    return made


def plot(path: Path, name: str, results: dict[str, Any]) -> None:
    """The result as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    if name == "table":
        methods = list(dict.fromkeys(row["method"] for row in results["rows"][1:]))
        for method in methods:
            rows = [row for row in results["rows"] if row["method"] == method]
            axes.plot([row["workers"] for row in rows], [row["error"] for row in rows],
                      marker="o", label=method)
        axes.axhline(results["rows"][0]["error"], color="k", ls=":", label="SGD")
        axes.set(xlabel="workers", ylabel="test error (%)")
    elif name == "lam":
        lams = [lam for lam in results["errors"] if float(lam) > 0]
        axes.plot([float(lam) for lam in lams], [np.median(results["errors"][lam]) for lam in lams],
                  marker="o", label="DC-ASGD-a")
        axes.axhline(np.median(results["errors"]["0.0"]), color="r", ls="--", label="ASGD")
        axes.axhline(np.median(results["sequential"]), color="k", ls=":", label="SGD")
        axes.set(xlabel="lam", ylabel="test error (%)", xscale="log")
    else:
        for workers, by_mu in results["errors"].items():
            axes.plot(list(map(float, by_mu)), [np.median(e) for e in by_mu.values()], marker="o",
                      label=f"{workers} workers")
        axes.set(xlabel="momentum", ylabel="test error (%)", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


MEASURES = {"table": table, "lam": influence_of_lam, "momentum": momentum_by_workers}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs one of the three; returns what goes into the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("measure", choices=list(MEASURES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="20, for momentum 10")
    parser.add_argument("--cifar10", type=Path, metavar="FOLDER",
                        help="CIFAR-10's python files instead of the digits; takes hours")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    options.epochs = options.epochs or (10 if options.measure == "momentum" else 20)
    console = Console()
    began = time.perf_counter()
    with console.status(options.measure) as status:
        data = digits() if options.cifar10 is None else cifar10(options.cifar10)
        results = MEASURES[options.measure](data, options.seeds, options.epochs, status.update)
    results |= {"benchmark": f"async_digits {options.measure}", "seeds": options.seeds,
             "epochs": options.epochs, "rates": list(RATES)}
    console.print(shown(options.measure, results))
    console.print(f"{time.perf_counter() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.plot:
        plot(options.plot, options.measure, results)
    return results


if __name__ == "__main__":
    main()

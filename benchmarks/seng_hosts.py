"""SENG on several hosts: steps, bytes and seconds until a loss, on 1, 2 and 4 hosts with links of a rate.

    python -m benchmarks.seng_hosts --rate 1gbit --json out/seng_hosts.json      # as root, minutes

The convolutions of ``benchmarks.seng_race``, 64 samples a rank, so that a step on M hosts takes M times
the samples. Every way tries the rates of its row, multiplied by the square root of M; the figure is the
best one's. The loss is rank 0's, over the held-out digits; it is looked at off the clock. Ranks share this
machine's cores: seconds on M hosts are those of M ranks in turn, and only ways on as many hosts compare.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import hvd_ext.torch as hvd
from benchmarks.seng_race.workloads import WORKLOADS
from tests.cluster.hosts import Cluster, missing, sent_bytes

WORKLOAD = WORKLOADS["convolutions"]
SETTINGS = {"damping": 0.3, "update_freq": 10, "stale_curvature": "rescale", "subsample": 32}
SGD_RATES, SENG_RATES = (0.05, 0.1, 0.2), (0.1, 0.3, 0.6)
WAYS: dict[str, tuple[dict[str, Any] | None, tuple[float, ...]]] = {
    "SGD": (None, SGD_RATES),
    "SENG, block": ({"coupling": "block"}, SENG_RATES),
    "SENG, lagged": ({"coupling": "lagged"}, SENG_RATES),
    "SENG, full": ({"coupling": "full"}, SENG_RATES),
}


def train(way: str, rate: float, name: str, seconds: float, steps: int) -> dict[str, Any]:
    """Train until the target; called on all ranks.

    Args:
        rate: SGD's learning rate, and lr/damping of SENG, on one rank.

    Returns:
        ``steps``, None where the target was missed; ``seconds`` on rank 0's clock; ``bytes`` that this host
        sent in a step; ``value``, the lowest loss.
    """
    torch.set_num_threads(1)
    problem = WORKLOAD.make(0)
    settings, _ = WAYS[way]
    lr = rate * math.sqrt(hvd.size())
    seng = None
    if settings is not None:
        seng = hvd.SENG(problem.model, name=name, **SETTINGS, **settings)
        lr *= SETTINGS["damping"]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(problem.model.parameters(), lr=lr, momentum=0.9, nesterov=True),
        named_parameters=[(f"{name}.{own}", p) for own, p in problem.model.named_parameters()],
        preconditioner=seng)
    hvd.broadcast_parameters(problem.model.state_dict(), root_rank=0)
    rng = np.random.default_rng([0, hvd.rank()])
    clock, sent, lowest, reached, number = 0.0, 0, math.inf, False, 0
    while number < steps and clock < seconds and not reached:
        before, started = sent_bytes(), time.perf_counter()
        for _ in range(WORKLOAD.every):
            x, y = problem.draw(rng)
            optimizer.zero_grad()
            problem.loss(problem.model(x), y).backward()
            optimizer.step()
            number += 1
        both = torch.tensor([time.perf_counter() - started, problem.value()])
        sent += sent_bytes() - before
        took, value = hvd.broadcast(both, root_rank=0, name=f"{name}.value").tolist()
        clock, lowest = clock + took, min(lowest, value if math.isfinite(value) else math.inf)
        reached = value <= WORKLOAD.target
        if not math.isfinite(value):
            break
    if seng is not None:
        seng.close()
    return {"way": way, "rate": rate, "steps": number if reached else None, "seconds": clock,
            "ms": 1e3 * clock / number, "bytes": sent / number, "value": lowest}


def show(table: list[dict[str, Any]], rate: str, console: Console) -> None:
    """The best rate of each way, by number of hosts."""
    shown = Table("hosts", "way", "steps", "s", "ms a step", "KB sent a step", "rate", title=(
        f"{WORKLOAD.shows} a rank; {WORKLOAD.measured} {WORKLOAD.target:g}; links of {rate}"))
    for row in table:
        done = row["steps"] is not None
        steps = str(row["steps"]) if done else f"missed ({row['value']:.3g})"
        shown.add_row(str(row["hosts"]), row["way"], steps, f"{row['seconds']:.1f}" if done else "",
                      f"{row['ms']:.0f}", f"{row['bytes'] / 1e3:.0f}", f"{row['rate']:g}")
    console.print(shown)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seng_hosts", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rate", default="1gbit", help="of each link, such as 100mbit, 1gbit, 10gbit")
    parser.add_argument("--seconds", type=float, default=20.0, help="most time of a run on the clock")
    parser.add_argument("--steps", type=int, default=400, help="most steps of a run")
    parser.add_argument("--json", type=Path, default=Path("out/seng_hosts.json"))
    args = parser.parse_args()
    why = missing()
    if why is not None:
        print(f"left out: no cluster can be made here: {why}")
        return
    console = Console(highlight=False)
    table: list[dict[str, Any]] = []
    for hosts in args.hosts:
        with Cluster(hosts, rate=args.rate) as cluster, cluster.ranks() as ranks:
            for way, (_, rates) in WAYS.items():
                runs = []
                for number, rate in enumerate(rates):
                    name = f"{way.replace(', ', '.')}.{number}"
                    results = ranks.run(train, way, rate, name, args.seconds, args.steps, timeout=300)
                    most = max(one["bytes"] for one in results)
                    runs.append({**results[0], "bytes": most, "hosts": hosts})
                best = min(runs, key=lambda run: (run["steps"] is None,
                                                  run["seconds"] if run["steps"] else run["value"]))
                table.append({**best, "runs": runs})
                console.print(f"{hosts} hosts, {way}: " + "; ".join(
                    f"rate {run['rate']:g}: {run['steps'] or 'missed'} steps, {run['seconds']:.1f} s, "
                    f"{run['value']:.3g}" for run in runs))
    show(table, args.rate, console)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"rate": args.rate, "rows": table}, indent=1))


if __name__ == "__main__":
    main()

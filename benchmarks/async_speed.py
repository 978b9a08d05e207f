"""Speed of asynchronous training, each time against a baseline of the same run.

    python -m benchmarks.async_speed --json out.json --plot out.png

Four questions, each asked in a program of its own under mpirun:

- straggler: 4 workers, one slowed 4 x; gradients per second of the parameter server against
  synchronous SGD (mpi4py's Allreduce) on the same worker ranks with the same pauses;
- rule: updates per second on the server with DC-ASGD-c and DC-ASGD-a against plain ASGD, with
  workers that compute nothing, so that the server is what limits;
- kernel: one update of 11.2 million parameters in the server's process against one memory copy
  of the bytes it must touch;
- servers: updates per second by number of server ranks, against one server.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.launch import mpirun
from hvd_ext.reducers.delay_compensation.update_rules import BLOCK_NUMEL, AsyncRule, apply_in_blocks

RESNET18 = 11_200_000  # parameters
RULES = {"asgd": AsyncRule(name="asgd"), "dc-asgd-c": AsyncRule(name="dc-asgd-c"),
         "dc-asgd-a": AsyncRule(name="dc-asgd-a")}
# Streams of 4 bytes an element that an update must read or write: w twice, the gradient, the
# reply; with compensation the pulled weights, with "-a" MeanSquare twice.
STREAMS = {"asgd": 4, "dc-asgd-c": 5, "dc-asgd-a": 7}


def kernel(numel: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of an update and of copying the bytes it must touch; medians."""
    rng = np.random.default_rng(0)
    w, g, bak, mean_square = (rng.random(numel, dtype=np.float32) for _ in range(4))
    work = np.empty(BLOCK_NUMEL, np.float32), np.empty(BLOCK_NUMEL, np.float32)
    source = np.ones(numel * 7 // 2 + 1, np.float32)
    target = np.ones_like(source)
    result = {}
    for name, rule in RULES.items():
        size = numel * STREAMS[name] // 2  # a copy reads and writes each element
        times: dict[str, list[float]] = {"update": [], "copy": []}
        for _ in range(repeats):
            began = time.perf_counter()
            apply_in_blocks(rule, w, g, lr=1e-6, momentum=0.0, w_bak=bak,
                            mean_square=mean_square, velocity=None, work=work)
            middle = time.perf_counter()
            np.copyto(target[:size], source[:size])
            times["update"].append(1e3 * (middle - began))
            times["copy"].append(1e3 * (time.perf_counter() - middle))
        result[name] = {key: statistics.median(values) for key, values in times.items()}
    return result


def rank_async(task: dict[str, Any]) -> dict[str, float] | None:
    """One rank of a parameter-server run; rank 0 returns its throughput."""
    from hvd_ext.async_ps.numpy import ParameterServer

    parameters = [np.zeros(task["numel"], np.float32)]
    gradient = [np.full(task["numel"], 1e-6, np.float32)]
    ps = ParameterServer(parameters, lr=0.1, rule=task["rule"], servers=task["servers"],
                         progress=False)
    if ps.is_server:
        report = ps.serve()
        return None if report is None else {"per_second": report.updates_per_second,
                                            "delay": report.delay.mean}
    pause = task["pause"] * (task["slow"] if ps.worker == ps.workers - 1 else 1)
    ends = time.perf_counter() + task["seconds"]
    while time.perf_counter() < ends:
        time.sleep(pause)
        ps.step(gradient)
    ps.finish()
    return None


def rank_sync(task: dict[str, Any]) -> dict[str, float] | None:
    """One rank of synchronous SGD over the worker ranks; gradients per second on the first."""
    from mpi4py import MPI

    servers = task["servers"]
    world = MPI.COMM_WORLD
    comm = world.Split(world.rank >= servers)
    if world.rank < servers:
        return None
    w = np.zeros(task["numel"], np.float32)
    gradient = np.full(task["numel"], 1e-6, np.float32)
    mean = np.empty_like(gradient)
    pause = task["pause"] * (task["slow"] if comm.rank == comm.size - 1 else 1)
    began = time.perf_counter()
    steps = 0
    going = np.ones(1, np.int32)
    while going[0]:
        time.sleep(pause)
        comm.Allreduce(gradient, mean)
        w -= 0.1 * mean / comm.size
        steps += 1
        going[0] = time.perf_counter() - began < task["seconds"]
        comm.Bcast(going)
    seconds = time.perf_counter() - began
    return {"per_second": steps * comm.size / seconds} if comm.rank == 0 else None


def launch(kind: str, ranks: int, task: dict[str, Any]) -> dict[str, float]:
    """Runs one program under mpirun; what its reporting rank returned."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = mpirun(ranks, "benchmarks.async_speed",
                         ["--rank", kind, "--task", json.dumps(task), "--json", str(out)],
                         ["--mca", "mpi_yield_when_idle", "1"])
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                       timeout=120, stdout=subprocess.DEVNULL)
        results: dict[str, float] = json.loads(out.read_text())
        return results


def measure(numel: int, seconds: float, repeats: int) -> dict[str, Any]:
    """All four questions; medians over ``repeats`` programs, baseline and candidate in turn."""
    base = {"numel": 100_000, "servers": 1, "slow": 4, "pause": 0.02, "seconds": seconds,
            "rule": "dc-asgd-c"}
    straggler: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}
    for _ in range(repeats):
        straggler["synchronous"].append(launch("sync", 5, base)["per_second"])
        straggler["asynchronous"].append(launch("async", 5, base)["per_second"])
    free = {**base, "slow": 1, "pause": 0.0, "numel": numel}
    rules: dict[str, list[float]] = {name: [] for name in RULES}
    for _ in range(repeats):
        for name in RULES:
            rules[name].append(launch("async", 3, {**free, "rule": name})["per_second"])
    servers: dict[str, list[float]] = {str(count): [] for count in (1, 2, 4)}
    for _ in range(repeats):
        for count in servers:
            task = {**free, "rule": "dc-asgd-a", "servers": int(count)}
            servers[count].append(launch("async", 2 + int(count), task)["per_second"])
    middle = {
        key: {name: statistics.median(values) for name, values in group.items()}
        for key, group in (("straggler", straggler), ("rules", rules), ("servers", servers))
    }
    return {"numel": numel, **middle, "kernel": kernel(RESNET18, 3 * repeats)}


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Each figure over its baseline."""
    found = {"asynchronous over synchronous, one worker slowed 4 x":
             results["straggler"]["asynchronous"] / results["straggler"]["synchronous"]}
    for name in ("dc-asgd-c", "dc-asgd-a"):
        found[f"time of a push with {name} over asgd"] = (
            results["rules"]["asgd"] / results["rules"][name])
        found[f"time of the update alone with {name} over asgd"] = (
            results["kernel"][name]["update"] / results["kernel"]["asgd"]["update"])
    for name in RULES:
        found[f"{name}: update of 11.2 M parameters over one copy of what it touches"] = (
            results["kernel"][name]["update"] / results["kernel"][name]["copy"])
    for count in ("2", "4"):
        found[f"updates per second with {count} servers over 1"] = (
            results["servers"][count] / results["servers"]["1"])
    return found


def plot(path: Path, results: dict[str, Any]) -> None:
    """Updates per second by server ranks, and by rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.5))
    for ax, key, title in zip(axes, ("straggler", "rules", "servers"),
                              ("one worker slowed 4 x", "rule", "server ranks"), strict=True):
        ax.bar(list(results[key]), list(results[key].values()))
        ax.set(title=title, ylabel="gradients per second")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark, or one rank of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--numel", type=int, default=1_000_000,
                        help="parameters in the rule and server measurements")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each program")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rank", choices=["async", "sync"], help=argparse.SUPPRESS)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank:
        results = (rank_async if options.rank == "async" else rank_sync)(options.task)
        if results is not None:
            options.json.write_text(json.dumps(results))
        return
    results = measure(options.numel, options.seconds, options.repeats)
    found = ratios(results)
    table = Table("measured", "ratio", title="asynchronous training over MPI")
    for name, value in found.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({**results, "ratios": found}, indent=1))
    if options.plot:
        plot(options.plot, results)


if __name__ == "__main__":
    main()

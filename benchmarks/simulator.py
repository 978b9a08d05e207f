"""The simulator of ``hvd-ext plan`` against steps measured on an emulated cluster, and its curves.

    python -m benchmarks.simulator --hosts 2 4 8 --rates 100mbit 1gbit --json out/simulator.json
    python -m benchmarks.simulator --against out/cluster.json --cores 2
    python -m benchmarks.simulator --curves docs/scaling.svg

The first check makes clusters of network namespaces (as root, with iproute2) and, on each, measures links and
computing as ``hvd-ext plan --measure`` does and the rows of ``benchmarks.cluster``, in the same run. The
simulator gets the former, the model's shapes and the compute of a step, nothing of the rows but that
compute, which is the time of the dense exchange. All ranks share this machine's cores, with what else runs;
the load at the beginning is printed, and above the number of cores the figures are of other processes too.

``--against`` compares with what ``benchmarks.cluster --json`` has written, without measuring: all links get
the one speed at which the dense exchange takes its time (which is left out of the comparison), and computing
takes what the defaults of ``hvd_ext.planning.Work`` say, times the ranks on a core.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hvd_ext.planning import (
    Cluster,
    ComputeCosts,
    Link,
    Stragglers,
    Workload,
    collective_traffic,
    simulate_steps,
)
from hvd_ext.planning.measure import Measured, measure_cluster
from hvd_ext.planning.methods import Scenario, plan_exchanges
from tests.cluster.hosts import Cluster as Emulated
from tests.cluster.hosts import bits_per_second, missing

# Rows of benchmarks.cluster, and the simulator's names for them.
ROWS = {"dense": "dense", "fp16": "fp16", "TopK 1 %": "topk",
        "TopK 1 %, sparse allreduce": "topk sparse_allreduce", "delay compensation": "delay",
        "sharded": "sharded", "rank0": "rank0", "overlap": "overlap"}
MORE_ROWS = {"PowerSGD, rank 4": "powersgd rank 4", "sharded, fp16": "sharded, fp16",
             "TopK 1 %, rank0": "topk, rank0", "TopK 1 %, sharded": "topk, sharded",
             "overlap, fp16": "overlap, fp16", "overlap, TopK 1 %": "overlap, topk",
             "overlap, delay compensation": "overlap, delay"}
CLOSE = 0.20
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
DRAWN = ("dense", "fp16", "powersgd rank 4", "topk", "topk sparse_allreduce", "delay", "rank0", "sharded",
         "overlap")
SLOWEST = "compute of the slowest rank"
TICKS = (100, 150, 200, 300, 500, 700, 1000, 1500, 2000, 3000)
DEVICE = 3000.0  # gigabytes per second of a GPU's memory, for what is computed: an assumption


def set_ups() -> dict[str, tuple[Cluster, Workload, Stragglers]]:
    """What the curves are drawn for: a cluster of one host, which gets more of them, and a model."""
    return {
        "1e9 parameters, compute 500 ms; 8 GPUs a host, 2,400 Gbit/s inside, 400 Gbit/s a host": (
            Cluster(1, Link(400.0, 10.0), 8, Link(2400.0, 3.0)), Workload.of_size(10**9, 0.5, 128),
            Stragglers("lognormal", 0.03)),
        "25e6 parameters, compute 150 ms; one GPU a host, 10 Gbit/s": (
            Cluster(1, Link(10.0, 20.0)), Workload.of_size(25 * 10**6, 0.15), Stragglers("lognormal", 0.03)),
    }


def links_of(parameters: int) -> Measured:
    """What all ranks measure together."""
    return measure_cluster(parameters)


def check(hosts: int, rate: str, parameters: float, turns: int, steps: int) -> dict[str, Any]:
    """Measured and simulated milliseconds of the rows on one cluster."""
    from benchmarks.cluster import rows
    from benchmarks.cluster.__main__ import summary

    shapes = tuple(map(tuple, rows.shapes_of(parameters)))
    load = os.getloadavg()[0]
    with Emulated(hosts, rate=rate) as cluster, cluster.ranks(env={"HOROVOD_CYCLE_TIME": "1"}) as ranks:
        found: Measured = ranks.run(links_of, Workload(shapes).numel, timeout=300)[0]
        results = ranks.run(rows.measure, turns, steps, list(ROWS), parameters, timeout=900)
    table = {row["name"]: row for row in summary(results, rate) if row["name"] in ROWS}
    workload = Workload(shapes, results[0]["compute"])
    return {"hosts": hosts, "rate": rate, "parameters": workload.numel, "compute_ms": 1e3 * workload.compute,
            "load": load, "cluster": found.cluster.to_dict(), "work": found.work.to_dict(),
            "points": dict(found.points),
            "rows": compared(list(table.values()), workload, found.cluster, found.work)}


def compared(table: list[dict[str, Any]], workload: Workload, cluster: Cluster,
             work: ComputeCosts) -> list[dict[str, Any]]:
    """The rows of ``benchmarks.cluster``, with what is simulated for each."""
    by_name = {one.name: one for one in plan_exchanges(Scenario(workload, cluster.ranks, work))}
    result = []
    for row in table:
        name = {**ROWS, **MORE_ROWS}.get(row["name"])
        if name is None:
            continue
        found = simulate_steps(by_name[name], workload, cluster)
        result.append({"row": row["name"],
                       "exchange_ms": row.get("exchange_ms"), "step_ms": row.get("step_ms"),
                       "simulated_exchange_ms": 1e3 * found.exchange, "simulated_step_ms": 1e3 * found.step})
    return result


def against(path: Path, cores: int) -> dict[str, Any]:
    """The rows of a file of ``benchmarks.cluster``, with one link speed, that of its dense exchange."""
    from benchmarks.cluster import rows

    figures = json.loads(path.read_text())
    hosts = figures["hosts"]
    shapes = tuple(map(tuple, rows.shapes_of(figures["parameters"])))
    workload = Workload(shapes, figures["compute_ms"] / 1e3)
    usual = ComputeCosts().to_dict()
    work = ComputeCosts(**{name: value * max(1.0, hosts / cores) for name, value in usual.items()})
    dense = next(row["exchange_ms"] for row in figures["rows"] if row["name"] == rows.DENSE) / 1e3
    bits = 8 * collective_traffic("allreduce", 4 * workload.numel,
                                  Cluster.one_rank_per_host(hosts, Link(1.0))).rank
    cluster = Cluster.one_rank_per_host(hosts, Link(bits / (dense - 1e-9 * workload.numel * work.update_ns)
                                                    / 1e9, 0.0))
    table = [{**row, "exchange_ms": None} if row["name"] == rows.DENSE else row for row in figures["rows"]]
    return {"hosts": hosts, "rate": figures["rate"], "parameters": workload.numel,
            "compute_ms": figures["compute_ms"], "cluster": cluster.to_dict(), "work": work.to_dict(),
            "rows": compared(table, workload, cluster, work)}


def show(results: list[dict[str, Any]]) -> None:
    """The table for people; what is off by more than 20 % is marked."""
    console = Console(highlight=False, width=130)
    inside = total = 0
    for result in results:
        table = Table("row", "exchange, ms", "simulated", "ratio", "step, ms", "simulated", "ratio", title=(
            f"{result['hosts']} hosts at {result['rate']}, {result['parameters'] / 1e6:.1f} million "
            f"parameters, compute {result['compute_ms']:.0f} ms"))
        for row in result["rows"]:
            cells = [row["row"]]
            for what in ("exchange", "step"):
                took, said = row[f"{what}_ms"], row[f"simulated_{what}_ms"]
                if took is None:
                    cells += ["", f"{said:.0f}", ""]
                    continue
                near = abs(said / took - 1) <= CLOSE
                inside, total = inside + near, total + 1
                cells += [f"{took:.0f}", f"{said:.0f}", f"{said / took:.2f}" + ("" if near else " off")]
            table.add_row(*cells)
        console.print(table)
        cluster = result["cluster"]
        links = {name: f"{link['gbps'] * 1e3:.0f} Mbit/s" for name, link in
                 (cluster["measured"] or {"all": cluster["outer"]}).items()}
        console.print(f"links: {links}; {cluster['fixed_us'] / 1e3:.1f} ms a collective"
                      + (f"; load {result['load']:.1f} at the beginning" if "load" in result else ""))
        console.print("work, ns: "
                      + ", ".join(f"{name} {value:.1f}" for name, value in result["work"].items()))
    console.print(f"{inside} of {total} within {CLOSE:.0%}")


def curves() -> dict[str, dict[str, dict[str, list[float]]]]:
    """By set-up and method: milliseconds of a step by number of ranks."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for title, (host, workload, stragglers) in set_ups().items():
        lines = found.setdefault(title, {})
        for ranks in RANKS:
            cluster = host.of_hosts(ranks // host.per_host)
            setup = Scenario(workload, ranks, ComputeCosts.of_memory(DEVICE))
            ways = {one.name: (one, cluster) for one in plan_exchanges(setup, DRAWN) if one.name in DRAWN}
            if cluster.per_host > 1:
                ways["dense, hierarchical"] = ways["dense"][0], replace(cluster, hierarchical=True)
            for name, (one, where) in ways.items():
                result = simulate_steps(one, workload, where, stragglers)
                line = lines.setdefault(name, {"step_ms": [], "exchange_ms": [], "link_mb": []})
                line["step_ms"].append(1e3 * result.step)
                line["exchange_ms"].append(1e3 * result.exchange)
                line["link_mb"].append(one.link_bytes(where) / 1e6)
            lines.setdefault(SLOWEST, {"step_ms": []})["step_ms"].append(
                1e3 * workload.compute * float(
                    stragglers.draw_factors(np.random.default_rng(0), 400, ranks).max(axis=1).mean()))
    return found


def plot(path: Path, found: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    """Step time by ranks, a line for each method, a panel for each set-up."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hvd-ext"
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for lines in found.values() for name in lines))
    figure, panels = pyplot.subplots(1, len(found), figsize=(11, 4.6), layout="constrained")
    for axes, (title, lines) in zip(panels, found.items(), strict=True):
        for name, line in lines.items():
            number = names.index(name)
            style = "k:" if name == SLOWEST else f"C{number % 10}-o" if number < 5 else f"C{number % 10}--s"
            axes.plot(RANKS, line["step_ms"], style, markersize=3, label=name)
        axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="step, ms")
        axes.set_title(title.replace("; ", ";\n"), fontsize=9)
        axes.set_xticks(RANKS, [str(ranks) for ranks in RANKS], minor=False)
        low, high = axes.get_ylim()
        ticks = [tick for tick in TICKS if low <= tick <= high]
        axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def show_curves(found: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    """The curves as tables: steps, exchanges without compute, bytes through a host's link."""
    for title, lines in found.items():
        for key, heading in (("step_ms", "step, ms"), ("exchange_ms", "exchange, ms"),
                             ("link_mb", "MB through a host's link")):
            table = Table(heading, *map(str, RANKS), title=title)
            for name, line in lines.items():
                if key in line:
                    table.add_row(name, *(f"{value:.0f}" for value in line[key]))
            Console(highlight=False, width=130).print(table)


def main() -> None:
    """Check, or draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"])
    parser.add_argument("--params", type=float, default=2.8e6, help="of the model (default: %(default)g)")
    parser.add_argument("--turns", type=int, default=3, help="exchanges measured of each row")
    parser.add_argument("--steps", type=int, default=2, help="steps measured of each row")
    parser.add_argument("--against", type=Path, nargs="+", metavar="FILE",
                        help="compare with files of python -m benchmarks.cluster --json, and measure nothing")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1,
                        help="of the machine that they come from (default: %(default)s)")
    parser.add_argument("--curves", "--plot", type=Path, metavar="FILE",
                        help="draw step times up to 1,024 ranks, and check nothing")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.curves:
        found = curves()
        show_curves(found)
        plot(args.curves, found)
        _write(args.json, {"ranks": RANKS, "curves": found})
        return
    if args.against:
        results = [against(path, args.cores) for path in args.against]
        show(results)
        _write(args.json, {"checks": results})
        return
    for rate in args.rates:
        bits_per_second(rate)
    why = missing()
    if why is not None:
        print(f"left out: no cluster can be made here: {why}")
        return
    results = []
    for rate in args.rates:
        for hosts in args.hosts:
            results.append(check(hosts, rate, args.params, args.turns, args.steps))
            show(results[-1:])
            _write(args.json, {"checks": results})


def _write(path: Path | None, what: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(what, indent=1))


if __name__ == "__main__":
    main()

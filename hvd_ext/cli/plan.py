"""``hvd-ext plan``: what each way to exchange gradients costs on a cluster, and which one to take."""

import argparse
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from hvd_ext import checks
from hvd_ext.cli.console import CliError, stderr_console, stdout_console
from hvd_ext.planning import (
    Cluster,
    ComputeCosts,
    Link,
    Stragglers,
    Workload,
    collective_seconds,
    simulate_steps,
)
from hvd_ext.planning.break_even import (
    AGAINST,
    break_even_gbps,
    break_even_ranks,
    break_even_ratio,
    moment_elements,
    weight_bytes,
)
from hvd_ext.planning.measure import Measured, measure_cluster
from hvd_ext.planning.methods import Scenario, plan_exchanges
from hvd_ext.planning.recommend import Row, fastest, recommend_method
from hvd_ext.reducers.registry import SERVERS
from hvd_ext.reducers.topk import TopK
from hvd_ext.reducers.topk.wire import VALUE_BYTES

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "HOROVOD_RANK", "SLURM_PROCID")
START = ("mpirun -np 4 hvd-ext plan --measure --params 25e6, or "
         "hvd-ext launch --hosts h1:2,h2:2 -- hvd-ext plan --measure --params 25e6")


def add_subcommand(subcommands: Any) -> None:
    """Add the subcommand to ``hvd-ext``."""
    parser = subcommands.add_parser(
        "plan", help="say what each way to exchange gradients costs on a cluster, and which one to take",
        description="Bytes and milliseconds of one step under every way to exchange gradients, from links, "
        "ranks and compute; a recommendation; when TopK pays off; memory and bytes of each server.",
    )
    parser.add_argument("--params", type=float, required=True, help="parameters of the model: 25e6")
    parser.add_argument("--ranks", type=int, help="number of ranks, M")
    parser.add_argument("--hosts", type=int, help="number of hosts, in place of --ranks")
    parser.add_argument("--ranks-per-host", type=int, help="ranks that share a host's link (default: 1)")
    parser.add_argument("--gbps", type=float,
                        help="gigabits per second of each host's link, each way")
    parser.add_argument("--latency-us", type=float, help="microseconds of one hop (default: 20)")
    parser.add_argument("--inner-gbps", type=float,
                        help="the same inside of a host, for each rank (default: 400)")
    parser.add_argument("--inner-latency-us", type=float, help="(default: 5)")
    parser.add_argument("--hierarchical", action="store_true",
                        help="collectives go inside of the hosts first (HOROVOD_HIERARCHICAL_ALLREDUCE)")
    parser.add_argument("--compute-ms", type=float, default=0.0,
                        help="forward and backward pass of a rank; without it only exchanges are compared")
    parser.add_argument("--straggler", default="none",
                        help="how the ranks' compute differs: lognormal:0.1, exponential:0.1 (default: none)")
    parser.add_argument("--ratio", type=float, default=TopK().ratio,
                        help="TopK's kept fraction (default: %(default)g)")
    parser.add_argument("--values", default="float32", choices=sorted(VALUE_BYTES),
                        help="type of TopK's values on the wire (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=4, help="PowerSGD's (default: %(default)s)")
    parser.add_argument("--select-ns", type=float,
                        help="nanoseconds an element that TopK's selection takes (default: "
                        f"{ComputeCosts().select_ns:g}, one CPU core; --measure measures it)")
    parser.add_argument("--memory-bandwidth", type=float, metavar="GB_PER_S",
                        help="estimate what computing takes from the device's memory bandwidth, in gigabytes "
                        "per second (an H100 has about 3000), in place of one CPU core's figures")
    parser.add_argument("--moments", type=int, default=3,
                        help="elements of optimizer state per parameter: 1 momentum, 2 Adam, 3 AMSGrad "
                        "(default: %(default)s)")
    parser.add_argument("--method", nargs="+", default=[], metavar="NAME",
                        help="only methods whose name contains one of these: topk, overlap, rank0, ...")
    parser.add_argument("--measure", action="store_true",
                        help="measure links and computing on the ranks that this is started on")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--cluster", type=Path, metavar="FILE",
                        help="plan with what was measured; --ranks, --hosts: for another number of them")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run_command)


@dataclass(frozen=True)
class Deployment:
    """Where a step runs: the cluster, what computing takes, and what was measured of them."""

    cluster: Cluster
    work: ComputeCosts
    measured: Measured | None = None


def run_command(args: argparse.Namespace) -> int:
    """Print the plan; under ``--measure`` rank 0 does."""
    try:
        numel = _count_parameters(args.params)
        place = _measure_together(args, numel) if args.measure else _read_place(args)
        if place is None:
            return 0  # another rank than the first
        figures = plan_figures(args, numel, place)
    except (TypeError, ValueError) as error:
        raise CliError(str(error), "see hvd-ext plan --help") from error
    if args.json:
        stdout_console().print_json(json.dumps(figures))
        return 0
    if place.measured is not None:
        _show_measured(place.measured)
    show_plan(figures)
    return 0


def _count_parameters(params: float) -> int:
    if not (math.isfinite(params) and params >= 1):
        raise ValueError(f"--params must be at least 1, got {params:g}; for 25 million: 25e6")
    return round(params)


def _read_place(args: argparse.Namespace) -> Deployment:
    """From the arguments, or from a file."""
    if args.save is not None:
        raise ValueError("--save writes what --measure has measured; pass both")
    if args.cluster is not None:
        return _load_measured(args)
    if args.gbps is None:
        raise ValueError("--gbps is missing: the speed of each host's link; or measure it with --measure")
    per_host = 1 if args.ranks_per_host is None else args.ranks_per_host
    inner = Cluster(1, Link(1.0)).inner
    cluster = Cluster(
        _count_hosts(args, per_host), Link(args.gbps, 20.0 if args.latency_us is None else args.latency_us),
        per_host, Link(inner.gbps if args.inner_gbps is None else args.inner_gbps,
                       inner.latency_us if args.inner_latency_us is None else args.inner_latency_us),
        args.hierarchical)
    return Deployment(cluster, _compute_costs(args, ComputeCosts()))


def _count_hosts(args: argparse.Namespace, per_host: int) -> int:
    checks.check_int("--ranks-per-host", per_host, low=1)
    if args.hosts is None and args.ranks is None:
        raise ValueError("--ranks is missing: how many there are; or --hosts with --ranks-per-host")
    if args.hosts is not None and args.ranks not in (None, args.hosts * per_host):
        raise ValueError(f"{args.hosts} hosts with {per_host} ranks are {args.hosts * per_host}, not "
                         f"--ranks {args.ranks}; leave one of them out")
    if args.hosts is not None:
        return checks.check_int("--hosts", args.hosts, low=1)
    ranks = checks.check_int("ranks", args.ranks, low=1)
    if ranks % per_host:
        raise ValueError(f"--ranks must be a multiple of --ranks-per-host {per_host}, got {ranks}")
    return ranks // per_host


def _compute_costs(args: argparse.Namespace, work: ComputeCosts) -> ComputeCosts:
    if args.memory_bandwidth is not None:
        work = ComputeCosts.of_memory(args.memory_bandwidth)
    return work if args.select_ns is None else replace(work, select_ns=args.select_ns)


def _refuse_links(args: argparse.Namespace, source: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in
             ("gbps", "latency_us", "inner_gbps", "inner_latency_us", "ranks_per_host")
             if getattr(args, name) is not None]
    given += ["--hierarchical"] * args.hierarchical
    if given:
        raise ValueError(f"{', '.join(given)} cannot be used with {source}, which says what the links are")


def _load_measured(args: argparse.Namespace) -> Deployment:
    _refuse_links(args, "--cluster")
    try:
        saved = json.loads(args.cluster.read_text())
        cluster, work = Cluster.from_dict(saved["cluster"]), ComputeCosts(**saved["work"])
    except OSError as error:
        raise ValueError(f"--cluster {args.cluster}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--cluster {args.cluster} is no file of hvd-ext plan --measure --save: "
                         f"{type(error).__name__}: {error}") from error
    if args.hosts is not None or args.ranks is not None:
        cluster = cluster.of_hosts(_count_hosts(args, cluster.per_host))
    return Deployment(cluster, _compute_costs(args, work))


def _measure_together(args: argparse.Namespace, numel: int) -> Deployment | None:
    """What all ranks measure together; None on other ranks than the first."""
    _refuse_links(args, "--measure")
    if args.cluster is not None or args.hosts is not None or args.ranks is not None:
        raise ValueError("--measure takes the ranks that it is started on; save what it measures (--save) "
                         "and plan for others with --cluster")
    if not any(name in os.environ for name in RANK_VARIABLES):
        raise CliError("--measure runs on all ranks of an allocation, and this is one process",
                       f"start it as {START}")
    Scenario(Workload.of_size(numel), 2, ratio=args.ratio, values=args.values, rank=args.rank)
    try:
        found = measure_cluster(numel, args.ratio, rank=args.rank)
    except ImportError as error:
        raise CliError(f"nothing to measure with: {error}", "hvd-ext install-horovod") from error
    if not found.first:
        return None
    if args.save is not None:
        args.save.write_text(json.dumps({"cluster": found.cluster.to_dict(), "work": found.work.to_dict()},
                                        indent=1))
        stderr_console().print(f"written: {args.save}", soft_wrap=True)
    return Deployment(found.cluster, _compute_costs(args, found.work), found)


def plan_figures(args: argparse.Namespace, numel: int, place: Deployment) -> dict[str, Any]:
    """Every figure of the tables and the sentences below them."""
    cluster = place.cluster
    checks.check_float("--compute-ms", args.compute_ms, low=0.0)
    compute = args.compute_ms / 1e3
    workload = Workload.of_size(numel, compute)
    stragglers = Stragglers.parse_text(args.straggler)
    setup = Scenario(workload, cluster.ranks, place.work, args.ratio, args.values, args.rank)
    rows = [Row(one, simulate_steps(one, workload, cluster, stragglers), one.rank_bytes(cluster),
                one.link_bytes(cluster)) for one in plan_exchanges(setup, tuple(args.method))]
    advice = recommend_method(rows, compute)
    gbps = {name: break_even_gbps(setup, cluster, name) for name in AGAINST}
    return {
        "params": numel, "ranks": cluster.ranks, "hosts": cluster.hosts,
        "gbps": getattr(cluster, cluster.narrow).gbps, "ratio": args.ratio, "values": args.values,
        "compute_seconds": compute, "straggler": args.straggler,
        "exchange": {row.exchange.name: {
            "bytes": round(row.rank_bytes), "link_bytes": round(row.link_bytes),
            "seconds": row.result.exchange, "step_seconds": row.result.step,
            "step_seconds_95": row.result.slowest} for row in rows},
        "best": fastest(rows, compute).exchange.name,
        "recommendation": None if advice is None else {
            "method": advice.method, "argument": advice.argument, "reason": advice.reason},
        "break_even_ranks": {name: break_even_ranks(args.ratio, size, args.values)
                             for name, size in AGAINST.items()},
        "break_even_ratio": {name: break_even_ratio(cluster.ranks, size, args.values)
                             for name, size in AGAINST.items()},
        "break_even_gbps": {name: None if math.isinf(speed) else speed
                            for name, speed in gbps.items()},
        "servers": _server_memory(numel, cluster, args.moments),
    }


def _server_memory(numel: int, cluster: Cluster, moments: int) -> dict[str, dict[str, float]]:
    checks.check_int("--moments", moments, low=0)
    ranks = cluster.ranks
    weights = {"rank0": collective_seconds("broadcast", 4 * numel, cluster),
               "sharded": collective_seconds("allgather", 4 * numel / ranks, cluster)}
    return {server: {"state_bytes": 4 * moment_elements(numel, ranks, server, moments),
                     "weight_bytes": weight_bytes(numel, ranks, server),
                     "seconds": weights.get(server, 0.0)} for server in SERVERS}


def _show_measured(found: Measured) -> None:
    """The fitted figures."""
    cluster = found.cluster
    table = Table("collective", "Gbit/s", "us per hop", "largest message, MB", "ms", title=(
        f"measured on {cluster.hosts} hosts with {cluster.per_host} ranks each; "
        f"{cluster.fixed_us:.0f} us for each collective"))
    for name, link in cluster.measured.items():
        size, took = found.points[name][-1]
        table.add_row(name, f"{link.gbps:.3g}", f"{link.latency_us:.0f}", f"{size / 1e6:.3g}",
                      f"{took * 1e3:.1f}")
    stdout_console().print(table)
    figures: Mapping[str, float] = found.work.to_dict()
    stdout_console().print("ns an element, all ranks at work: "
                           + ", ".join(f"{name.removesuffix('_ns')} {value:.2f}"
                                       for name, value in figures.items()))


def show_plan(figures: dict[str, Any]) -> None:
    """The figures for people."""
    console = stdout_console()
    compute = figures["compute_seconds"]
    several = figures["hosts"] != figures["ranks"]
    columns = ["method", "MB per rank", *(["MB per link"] if several else []), "exchange, ms",
               *(["step, ms"] if compute else []), "of dense"]
    table = Table(*columns, title=(
        f"{figures['params']:,} parameters, {figures['ranks']} ranks on {figures['hosts']} hosts, "
        f"{figures['gbps']:.3g} Gbit/s, TopK {figures['ratio']:g} in {figures['values']}"
        + (f", compute {compute * 1e3:g} ms, straggler {figures['straggler']}" if compute else "")))
    what = "step_seconds" if compute else "seconds"
    dense = figures["exchange"].get("dense", {}).get(what)
    for name, cost in figures["exchange"].items():
        row = [name, f"{cost['bytes'] / 1e6:.1f}"]
        row += [f"{cost['link_bytes'] / 1e6:.1f}"] if several else []
        row += [f"{cost['seconds'] * 1e3:.1f}"] + ([f"{cost['step_seconds'] * 1e3:.1f}"] if compute else [])
        table.add_row(*row, f"{cost[what] / dense:.2f}" if dense else "-")
    console.print(table)
    servers = Table("server", "MB of state, fullest rank", "MB of weights in", "ms")
    for name, cost in figures["servers"].items():
        servers.add_row(name, f"{cost['state_bytes'] / 1e6:.0f}", f"{cost['weight_bytes'] / 1e6:.0f}",
                        f"{cost['seconds'] * 1e3:.1f}")
    console.print(servers)
    console.print(f"Quickest here: {figures['best']}.")
    advice = figures["recommendation"]
    if advice is not None:
        console.print(f"Take {advice['method']} ({advice['argument']}): {advice['reason']}.", markup=False)
    ranks, gbps = figures["break_even_ranks"], figures["break_even_gbps"]
    for name in ranks:
        console.print(
            f"Against {name}: TopK moves fewer bytes below {ranks[name]} ranks at this ratio, or "
            f"below ratio {figures['break_even_ratio'][name]:.2g} at these ranks; "
            + ("with these ranks it is quicker on any link." if gbps[name] is None
               else "with these ranks it is quicker on no link." if gbps[name] == 0
               else f"with these ranks it is quicker on links below {gbps[name]:.3g} Gbit/s.")
        )

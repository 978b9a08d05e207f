"""``hvd-ext plan``: when TopK pays off on a cluster, and what each server costs."""

import argparse
import json
import math
from typing import Any

from rich.table import Table

from hvd_ext.cli.console import Failure, out
from hvd_ext.composition import SERVERS
from hvd_ext.topk import payoff
from hvd_ext.topk.wire import VALUE_BYTES


def register(subcommands: Any) -> None:
    """Add the subcommand to ``hvd-ext``."""
    parser = subcommands.add_parser(
        "plan", help="say when TopK pays off, and what each server costs",
        description="Bytes and seconds of one step's exchange on bandwidth-optimal rings: dense, "
        "in half precision, and with TopK; then the memory and bytes of each server.",
    )
    parser.add_argument("--params", type=float, required=True, help="parameters of the model: 25e6")
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks, M")
    parser.add_argument("--gbps", type=float, required=True,
                        help="gigabits per second of each rank's link, each way")
    parser.add_argument("--ratio", type=float, default=payoff.default_ratio(),
                        help="kept fraction (default: %(default)g)")
    parser.add_argument("--values", default="float32", choices=sorted(VALUE_BYTES),
                        help="type of the values on the wire (default: %(default)s)")
    parser.add_argument("--latency-us", type=float, default=20.0,
                        help="microseconds of one hop (default: %(default)g)")
    parser.add_argument("--select-ns", type=float, default=6.0,
                        help="nanoseconds an element that TopK computes; python -m "
                        "benchmarks.topk_exchange measures it (default: %(default)g, one CPU core)")
    parser.add_argument("--moments", type=int, default=3,
                        help="elements of optimizer state per parameter: 1 momentum, 2 Adam, 3 AMSGrad "
                        "(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    try:
        figures = plan(args)
    except (TypeError, ValueError) as error:
        raise Failure(str(error), "see hvd-ext plan --help") from error
    if args.json:
        out().print_json(json.dumps(figures))
    else:
        show(figures)
    return 0


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Every figure of the two tables and the sentence below them."""
    if not (math.isfinite(args.params) and args.params >= 1):
        raise ValueError(f"--params must be at least 1, got {args.params:g}; for 25 million: 25e6")
    numel = round(args.params)
    link = payoff.Link(args.gbps, args.latency_us, args.select_ns)
    found = payoff.costs(numel, args.ranks, args.ratio, link, values=args.values)
    against = {"dense": payoff.DENSE_BYTES, "fp16": payoff.HALF_BYTES}
    gbps = {name: payoff.break_even_gbps(numel, args.ranks, args.ratio, link, name,
                                         values=args.values) for name in against}
    return {
        "params": numel, "ranks": args.ranks, "gbps": args.gbps, "ratio": args.ratio,
        "values": args.values,
        "exchange": {name: {"bytes": cost.moved, "seconds": cost.seconds}
                     for name, cost in found.items()},
        "best": min(found.values(), key=lambda cost: cost.seconds).name,
        "break_even_ranks": {name: payoff.break_even_ranks(args.ratio, size, args.values)
                             for name, size in against.items()},
        "break_even_ratio": {name: payoff.break_even_ratio(args.ranks, size, args.values)
                             for name, size in against.items()},
        "break_even_gbps": {name: None if math.isinf(speed) else speed
                            for name, speed in gbps.items()},
        "servers": {server: {
            "state_bytes": 4 * payoff.moment_elements(numel, args.ranks, server, args.moments),
            "weight_bytes": payoff.weight_bytes(numel, args.ranks, server),
            "seconds": link.seconds(payoff.weight_bytes(numel, args.ranks, server),
                                    args.ranks - 1 if server != "replicated" else 0),
        } for server in SERVERS},
    }


def show(figures: dict[str, Any]) -> None:
    """The figures for people."""
    console = out()
    table = Table("exchange", "MB per rank", "ms", "against dense", title=(
        f"{figures['params']:,} parameters, {figures['ranks']} ranks, {figures['gbps']:g} Gbit/s, "
        f"ratio {figures['ratio']:g} in {figures['values']}"))
    dense = figures["exchange"]["dense"]["seconds"]
    for name, cost in figures["exchange"].items():
        ratio = f"{cost['seconds'] / dense:.2f}" if dense else "-"
        table.add_row(name, f"{cost['bytes'] / 1e6:.1f}", f"{cost['seconds'] * 1e3:.1f}", ratio)
    console.print(table)
    servers = Table("server", "MB of state, fullest rank", "MB of weights in", "ms")
    for name, cost in figures["servers"].items():
        servers.add_row(name, f"{cost['state_bytes'] / 1e6:.0f}",
                        f"{cost['weight_bytes'] / 1e6:.0f}", f"{cost['seconds'] * 1e3:.1f}")
    console.print(servers)
    ranks, gbps = figures["break_even_ranks"], figures["break_even_gbps"]
    console.print(f"Quickest here: {figures['best']}.")
    for name in ranks:
        console.print(
            f"Against {name}: TopK moves fewer bytes below {ranks[name]} ranks at this ratio, or "
            f"below ratio {figures['break_even_ratio'][name]:.2g} at these ranks; "
            + ("with these ranks it is quicker on any link." if gbps[name] is None
               else "with these ranks it is quicker on no link." if gbps[name] == 0
               else f"with these ranks it is quicker on links below {gbps[name]:.3g} Gbit/s.")
        )

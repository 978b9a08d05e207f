"""Exchange and step of each extension over hosts with links of a given rate, on one machine.

    python -m benchmarks.cluster --hosts 4 --rate 1gbit --json out/cluster.json

Hosts are network namespaces (as root, with iproute2), one rank on each. "exchange" is a step without
compute, of the 11.2 million parameters of a ResNet-18 (``--params``: of a narrower or wider one) under
SGD: its time ends when the weights are updated. "step" is one whose forward and backward pass sleep
together for as long as the dense exchange takes, as a GPU would compute beside the CPU: the ranks share
this machine's cores, and on them the compute of one rank would hold up the exchange of another. Rows with
``overlap=`` wait for the exchange that the step before began. What the cores must do for an exchange (sums,
selection, copies, the network itself) is shared too: on hosts with cores of their own it takes less.

All rows take turns in one run; a row's time is the median over turns of the slowest rank. "sent" is what
the interface of the busiest host counted, headers included. "of the link" is the least time that a
ring allreduce of float32 takes at this rate, 2(M-1)/M bytes/rate, in percent of the row's time:
above 100 where less is sent.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cluster import rows
from tests.cluster.hosts import Cluster, bits_per_second, missing


def summary(results: list[dict[str, Any]], rate: str) -> list[dict[str, Any]]:
    """A row for each way: milliseconds, megabytes, and how they compare."""
    hosts, first = len(results), results[0]
    limit = 2 * (hosts - 1) / hosts * first["parameters"] * 32 / bits_per_second(rate)

    def over_ranks(what: str, name: str, place: int) -> float:
        turns = zip(*(result[what][name] for result in results), strict=True)
        return float(median(max(figure[place] for figure in turn) for turn in turns))

    dense = over_ranks("exchange", rows.DENSE, 0)
    table = []
    for name in first["exchange"]:
        seconds = over_ranks("exchange", name, 0)
        row = {"name": name, "exchange_ms": 1e3 * seconds, "of_dense": seconds / dense,
               "sent_mb": over_ranks("exchange", name, 1) / 1e6, "of_link": limit / seconds}
        if name in first["step"]:
            row["step_ms"] = 1e3 * over_ranks("step", name, 0)
        table.append(row)
    return table


def show(table: list[dict[str, Any]], figures: dict[str, Any]) -> None:
    """The table for people."""
    shown = Table("exchange of", "ms", "of dense", "MB sent", "of the link", "step, ms", title=(
        f"{figures['parameters'] / 1e6:.1f} million parameters, {figures['hosts']} hosts at "
        f"{figures['rate']}; compute {figures['compute_ms']:.0f} ms a step"))
    for row in table:
        shown.add_row(row["name"], f"{row['exchange_ms']:.0f}", f"{row['of_dense']:.2f}",
                      f"{row['sent_mb']:.1f}", f"{100 * row['of_link']:.0f} %",
                      f"{row['step_ms']:.0f}" if "step_ms" in row else "")
    Console(highlight=False).print(shown)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", default="1gbit", help="of each link, such as 100mbit, 1gbit, 10gbit")
    parser.add_argument("--turns", type=int, default=7, help="exchanges measured of each row")
    parser.add_argument("--steps", type=int, default=4, help="steps measured of each row")
    parser.add_argument("--params", type=float, default=rows.PARAMETERS,
                        help="make the ResNet-18 as wide as gives about so many (default: %(default)g)")
    parser.add_argument("--only", nargs="*", default=[], metavar="ROW",
                        help=", ".join(rows.ways()).replace("%", "%%"))
    parser.add_argument("--json", type=Path, default=Path("out/cluster.json"))
    args = parser.parse_args()
    unknown = [name for name in args.only if name not in rows.ways()]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(rows.ways())}")
    why = missing()
    if why is not None:
        print(f"left out: no cluster can be made here: {why}")
        return
    with Cluster(args.hosts, rate=args.rate) as cluster, \
            cluster.ranks(env={"HOROVOD_CYCLE_TIME": "1"}) as ranks:  # Horovod's default
        results = ranks.run(rows.measure, args.turns, args.steps, args.only, args.params, timeout=1500)
    table = summary(results, args.rate)
    figures = {"hosts": args.hosts, "rate": args.rate, "parameters": results[0]["parameters"],
               "compute_ms": 1e3 * results[0]["compute"], "rows": table}
    show(table, figures)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

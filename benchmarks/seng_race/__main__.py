"""Time to a target, by the clock: SENG against SGD, AdamW, Muon, SOAP, Shampoo and
K-FAC on five problems.

    python -m benchmarks.seng_race --json out/seng_race.json --plot out/seng_race.png
    python -m benchmarks.seng_race --additions --json out/seng_additions.json
    python -m benchmarks.seng_race --quick

AlgoPerf's method at a size that a CPU can do. Each method gets the same number of trials, drawn by a
quasi-random sequence from a space that is the same for all problems, with one seed; the trial that comes
to the target first (or, where none does, closest to it) is run again with the other seeds. Its figure is
the median over seeds. The clock runs during steps, not while the loss is measured; a process has a core
of its own and one thread. A trial is ended when it has taken as long as the best before it.

The profile gives for each method the part of the problems on which it takes at most tau times as long as
the fastest, and the area under that from 1 to 4.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.seng_race import results
from benchmarks.seng_race.additions import ADDITIONS
from benchmarks.seng_race.methods import METHODS
from benchmarks.seng_race.runs import contest, find_method, on_own_core
from benchmarks.seng_race.workloads import WORKLOADS


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the race; returns what goes into the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seng_race", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *ADDITIONS],
                        default=list(METHODS))
    parser.add_argument("--additions", action="store_true",
                        help="SENG with what other second-order methods add, in place of --methods")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="most time of a run; default: the problem's")
    parser.add_argument("--quick", action="store_true", help="one trial of one second")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="write the profile here")
    options = parser.parse_args(arguments)
    if options.quick:
        options.trials = options.seeds = 1
        options.seconds = 1.0
    if options.additions:
        options.methods = list(ADDITIONS)
    console = Console()
    missing = [name for name in options.methods
               if (needs := find_method(name).needs) and importlib.util.find_spec(needs) is None]
    if missing:
        console.print(f"without {', '.join(missing)}: pip install 'hvd-ext[race]' for them")
    methods = [name for name in options.methods if name not in missing]
    jobs = [(name, method, options.trials, options.seeds, options.seconds or WORKLOADS[name].seconds)
            for name in options.workloads for method in methods]
    found: list[dict[str, Any]] = []
    context = get_context("spawn")
    cores = context.Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)
    with context.Pool(len(os.sched_getaffinity(0)), on_own_core, (cores,)) as pool:
        for one in pool.imap_unordered(contest, jobs):
            found.append(one)
            console.print(results.line(one))
    order = [job[:2] for job in jobs]
    found.sort(key=lambda one: order.index((one["workload"], one["method"])))
    results.show(found, console)
    summary = {"benchmark": "seng_race", "trials": options.trials, "seeds": options.seeds,
               "contests": found, "profile": results.profile(found)}
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1))
    if options.plot:
        results.plot(options.plot, summary["profile"])
    return summary


if __name__ == "__main__":
    main()

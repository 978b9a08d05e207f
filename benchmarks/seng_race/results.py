"""What the race comes to: lines, a table, and the performance profile."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.seng_race.workloads import WORKLOADS

FARTHEST = 4.0


def line(one: dict[str, Any]) -> str:
    """A contest, when it has ended."""
    ends = ", ".join(f"{run['seconds']:.1f} s" if run["seconds"] else f"{run['ended']} at {run['value']:.3g}"
                     for run in one["trials"])
    return f"{one['workload']}, {one['method']}: trials {ends}; then {cell(one)}"


def cell(one: dict[str, Any]) -> str:
    """Seconds and steps, or how close it came."""
    if one["seconds"] is None:
        return f"missed ({median(run['value'] for run in one['runs']):.3g})"
    return f"{one['seconds']:.2f} s, {one['steps']:.0f} steps"


def settings(one: dict[str, Any]) -> str:
    """The best trial's."""
    return ", ".join(f"{name} {value:.2g}" for name, value in one["runs"][0]["values"].items())


def show(found: list[dict[str, Any]], console: Console) -> None:
    """A table for each problem, then the areas under the profile."""
    for name in dict.fromkeys(one["workload"] for one in found):
        workload = WORKLOADS[name]
        table = Table("method", "time to target", "ms a step", "best trial", title=(
            f"{workload.shows}; {workload.measured} {workload.target:g}"))
        for one in found:
            if one["workload"] == name:
                table.add_row(one["method"], cell(one), f"{median(r['ms'] for r in one['runs']):.2f}",
                              settings(one))
        console.print(table)
        if not all(one["measured_text"] for one in found):
            console.print("the help of this Python is not the one that the figures in the docs are of")
    areas = Table("method", f"area under the profile, 1 to {FARTHEST:g}")
    for method, (_, area) in sorted(profile(found).items(), key=lambda item: -item[1][1]):
        areas.add_row(method, f"{area:.2f}")
    console.print(areas)


def profile(found: list[dict[str, Any]]) -> dict[str, tuple[list[float], float]]:
    """For each method the sorted ratios to the fastest (infinite where it missed) and its area."""
    fastest: dict[str, float] = {}
    for one in found:
        fastest[one["workload"]] = min(fastest.get(one["workload"], math.inf), one["seconds"] or math.inf)
    curves: dict[str, tuple[list[float], float]] = {}
    for method in dict.fromkeys(one["method"] for one in found):
        ratios = sorted(one["seconds"] / fastest[one["workload"]] if one["seconds"] else math.inf
                        for one in found if one["method"] == method)
        area = sum(max(FARTHEST - ratio, 0.0) for ratio in ratios) / (FARTHEST - 1.0) / len(ratios)
        curves[method] = (ratios, area)
    return curves


def plot(path: Path, curves: dict[str, tuple[list[float], float]]) -> None:
    """Part of the problems against tau."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    taus = np.linspace(1.0, FARTHEST, 301)
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for method, (ratios, _) in curves.items():
        axes.plot(taus, [np.mean(np.array(ratios) <= tau) for tau in taus], label=method,
                  lw=2.5 if method.startswith("SENG") else 1.5)
    axes.set(xlabel="time, in multiples of the fastest", ylabel="part of the problems", ylim=(-0.03, 1.03),
             title="time to target, five trials each")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)

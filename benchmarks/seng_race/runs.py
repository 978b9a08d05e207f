"""A run, and a method's runs on one problem: trials first, then the best of them with more seeds."""

from __future__ import annotations

import math
import os
import time
import warnings
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.stats import qmc

from benchmarks.seng_race.additions import ADDITIONS
from benchmarks.seng_race.data import is_the_measured_text
from benchmarks.seng_race.methods import METHODS, Method, Values
from benchmarks.seng_race.workloads import WORKLOADS, Workload


def on_own_core(cores: Any) -> None:
    """Bind a process to the next core."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {cores.get()})
    warnings.simplefilter("ignore")


def find_method(name: str) -> Method:
    """A method of the race, or an addition to SENG."""
    return METHODS[name] if name in METHODS else ADDITIONS[name]


def trials(method: Method, count: int) -> list[Values]:
    """Points of the method's space."""
    low, high = (np.log([limits[end] for limits in method.space.values()]) for end in (0, 1))
    points = qmc.scale(qmc.Halton(len(method.space), rng=0).random(count), low, high)
    return [dict(zip(method.space, map(float, np.exp(point)), strict=True)) for point in points]


def run(method: Method, values: Values, workload: Workload, seed: int, seconds: float) -> dict[str, Any]:
    """Train to the target, or until the time or the steps are used up, or the loss is none any more.

    Returns:
        ``seconds`` on the clock and ``steps``, both None where the target was missed; ``value``, the
        lowest loss that was measured; ``ended``; ``ms``, a step's time.
    """
    problem = workload.make(seed)
    rng = np.random.default_rng(seed)
    started = time.perf_counter()
    step = method.begin(problem, values, workload)
    clock = time.perf_counter() - started
    lowest, ended = math.inf, "steps used up"
    for number in range(1, workload.steps + 1):
        x, y = problem.draw(rng)
        started = time.perf_counter()
        step(x, y)
        clock += time.perf_counter() - started
        if number % workload.every:
            continue
        now = problem.value()
        if not math.isfinite(now) or now > 1e3:
            ended = "diverged"
            break
        lowest = min(lowest, now)
        if now <= workload.target:
            ended = "target"
            break
        if clock > seconds:
            ended = "time used up"
            break
    reached = ended == "target"
    return {"values": values, "seed": seed, "seconds": clock if reached else None,
            "steps": number if reached else None, "value": lowest, "ended": ended,
            "ms": 1e3 * clock / number}


def contest(job: tuple[str, str, int, int, float]) -> dict[str, Any]:
    """All runs of a method on a problem, and what they come to."""
    workload_name, method_name, count, seeds, seconds = job
    method, workload = find_method(method_name), WORKLOADS[workload_name]
    # What is imported and compiled once is no part of a run.
    run(method, trials(method, 1)[0], replace(workload, steps=3), 0, seconds)
    tried: list[dict[str, Any]] = []
    limit = seconds
    for values in trials(method, count):
        tried.append(run(method, values, workload, 0, limit))
        limit = min(limit, tried[-1]["seconds"] or limit)
    best = min(tried, key=lambda one: (one["seconds"] or math.inf, one["value"]))
    repeated = [best, *(run(method, best["values"], workload, seed, seconds) for seed in range(1, seeds))]
    times = [one["seconds"] or math.inf for one in repeated]
    middle = median(times)
    steps = median([one["steps"] or math.inf for one in repeated])
    return {"workload": workload_name, "method": method_name, "trials": tried, "runs": repeated,
            "seconds": middle if math.isfinite(middle) else None,
            "steps": steps if math.isfinite(steps) else None,
            "measured_text": workload_name != "text" or is_the_measured_text()}

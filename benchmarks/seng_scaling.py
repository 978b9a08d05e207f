"""How SENG's cost grows with n, rho, q and r, beside the growth of SENG Table 2.

    python -m benchmarks.seng_scaling --json out.json

Each operation is timed alone (CPU time of its one thread), on random tensors, at a base size and
with one quantity doubled twice; the exponent is the slope of log time against log size, and
Table 2's is printed beside it. Smaller ones mean that fixed costs still count at these sizes,
larger ones that the operands no longer fit a cache. Bytes held are
measured on a layer and set beside the formula (rho n; (n_G + n_A) r rho).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import hvd_ext.torch as hvd
from hvd_ext.torch.seng import kernels

BASE = {"n": 400_000, "rho": 32, "q": 20_000, "r": 8, "side": 384}


@dataclass(frozen=True)
class Operation:
    """One row of Table 2: ``prepare(**sizes)`` gives the function to time."""

    name: str
    formula: str
    exponents: dict[str, float]
    prepare: Callable[..., Callable[[], Any]]


def explicit(kind: str) -> Callable[..., Callable[[], Any]]:
    """Operations on U (rho, n), or its sketch (rho, q)."""

    def prepare(n: int, rho: int, q: int, **_: int) -> Callable[[], Any]:
        u = torch.randn(rho, q if kind == "gram, sketched" else n)
        z, b = torch.randn(u.shape[1]), torch.randn(rho)
        out = torch.empty(u.shape[1])
        return {
            "gram": lambda: kernels.gram_explicit(u),
            "gram, sketched": lambda: kernels.gram_explicit(u),
            "project": lambda: kernels.project_explicit(u, z),
            "expand": lambda: kernels.expand_explicit(u, b, out),
        }[kind]

    return prepare


def implicit(kind: str) -> Callable[..., Callable[[], Any]]:
    """Operations on factors (1, side, r, rho) of a layer of side² parameters."""

    def prepare(rho: int, r: int, side: int, **_: int) -> Callable[[], Any]:
        g, a = torch.randn(1, side, r, rho), torch.randn(1, side, r, rho)
        z, c = torch.randn(1, side, side), torch.randn(rho)
        out = torch.empty(1, side, side)

        def factored() -> torch.Tensor:
            left, right = kernels.factored_means(g, a, c, c.abs().sqrt().sum())
            return left @ right.mT

        def exact() -> torch.Tensor:
            left, right = kernels.exact_terms(g, a, c)
            return torch.matmul(left, right.mT, out=out)

        return {
            "gram": lambda: kernels.gram_implicit(g, a),
            "project": lambda: kernels.project_implicit(g, a, z),
            "exact": exact,
            "factored": factored,
        }[kind]

    return prepare


OPERATIONS = [
    Operation("U^T U, original (10)", "rho² n", {"rho": 2, "n": 1}, explicit("gram")),
    Operation("U^T U, sketched (11)", "rho² q", {"rho": 2, "q": 1}, explicit("gram, sketched")),
    Operation("U^T z (18)", "rho n", {"rho": 1, "n": 1}, explicit("project")),
    Operation("U c, explicit", "rho n", {"rho": 1, "n": 1}, explicit("expand")),
    Operation("U^T z, factors (19)", "n_A n_G rho r", {"rho": 1, "r": 1, "side": 2},
              implicit("project")),
    Operation("U^T U, factors (21)", "r² rho² (n_A + n_G)", {"rho": 2, "r": 2, "side": 1},
              implicit("gram")),
    Operation("U c, exact (22)", "n_A n_G rho r", {"rho": 1, "r": 1, "side": 2},
              implicit("exact")),
    Operation("U c, factored (23)", "n_A n_G r", {"rho": 0, "r": 1, "side": 2},
              implicit("factored")),
]


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """The fastest of several runs."""
    function()
    taken = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        taken.append(time.process_time() - begin)
    return min(taken)


def measure(repeats: int, scale: float) -> list[dict[str, Any]]:
    """The exponent of each operation in each of its quantities."""
    base = {key: max(4, round(value * (scale if key in ("n", "q", "side") else 1.0)))
            for key, value in BASE.items()}
    rows = []
    for operation in OPERATIONS:
        for quantity, wanted in operation.exponents.items():
            sizes = [base[quantity] * factor for factor in (1, 2, 4)]
            times = [seconds(operation.prepare(**{**base, quantity: size}), repeats)
                     for size in sizes]
            slope = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
            rows.append({"operation": operation.name, "formula": operation.formula,
                         "quantity": quantity, "sizes": sizes, "seconds": times,
                         "exponent": slope, "table_2": wanted})
    return rows


def memory() -> list[dict[str, Any]]:
    """Bytes held for a layer of 512 × 1025 parameters, beside the formula."""
    rows = []
    for held, threshold in (("explicit", 10**9), ("implicit", 0)):
        for rho in (16, 32, 64):
            model = nn.Linear(1024, 512)
            seng = hvd.SENG(model, damping=1.0, explicit_threshold=threshold, sketch=None)
            model(torch.randn(rho, 4, 1024)).square().mean().backward()
            seng.step()
            (row,) = seng.report()["layers"]
            rows.append({"held": held, "rho": rho, "bytes": row["bytes"],
                         "formula_bytes": row["formula_bytes"]})
    return rows


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what goes into the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="of the base sizes")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, held = measure(options.repeats, options.scale), memory()
    table = Table(title="growth of the cost: exponent measured and by SENG Table 2")
    for column in ("operation", "Table 2", "in", "sizes", "milliseconds", "measured", "Table 2 "):
        table.add_column(column)
    for row in rows:
        table.add_row(row["operation"], row["formula"], row["quantity"],
                      " ".join(map(str, row["sizes"])),
                      " ".join(f"{1e3 * t:.2f}" for t in row["seconds"]),
                      f"{row['exponent']:.2f}", f"{row['table_2']:g}")
    sizes = Table(title="bytes held for 512 × 1025 parameters, kappa 4")
    for column in ("held", "rho", "bytes", "by the formula"):
        sizes.add_column(column, justify="right")
    for row in held:
        sizes.add_row(row["held"], str(row["rho"]), f"{row['bytes']:,}",
                      f"{row['formula_bytes']:,}")
    console = Console(width=140)
    console.print(table, sizes)
    summary = {"benchmark": "seng_scaling", "cost": rows, "memory": held}
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1))
    return summary


if __name__ == "__main__":
    main()

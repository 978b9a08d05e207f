"""Cost of a SENG step against plain SGD: ResNet-18 (11.2 million parameters), 32 × 32 images.

    python -m benchmarks.seng_step --json out.json          # one rank, two threads
    python -m benchmarks.seng_step --model autoencoder --subsample 50   # small layers: calls are what costs
    python -m benchmarks.seng_step --ranks 2 --json out.json  # block and lagged side by side

One step is forward, backward, (precondition,) momentum SGD. Steps of plain SGD, of SENG between
refreshes and of SENG with a refresh take turns in one process, so that other load meets all of
them equally; ratios are of medians, of the fastest steps, and of the process's CPU time (medians),
which load from outside disturbs least. All layers are preconditioned. "amortised" is what
``--update-freq`` makes of the two. "calls" are torch's operators in one step, those that others call
included, "kernels" those among them that compute or move something, a view of a tensor being none
(``torch.profiler``); on a GPU each kernel is at least one launch.

The autoencoder is that of ``benchmarks.seng_autoencoder``: 8 linear layers of 64 to 128, batch 200, one
thread, all layers by their factors without a sketch, as there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.profiler import ProfilerActivity, profile

import hvd_ext.torch as hvd
from benchmarks.autoencoder_torch import autoencoder
from benchmarks.launch import mpirun, under_mpirun
from examples.resnet import resnet18

# What a CPU run calls that would be a kernel on a GPU; operators made of these, and views, are not counted.
KERNELS = frozenset(f"aten::{name}" for name in (
    "abs", "add", "add_", "addmm", "addmm_", "addmv_", "all", "aminmax", "any", "argsort", "baddbmm_",
    "bmm", "cat", "clamp_min", "clamp_min_", "copy_", "convolution_backward", "cumsum", "div", "div_",
    "embedding", "eq", "exp", "fill_", "flip", "gather", "ge", "gt", "index", "index_add_",
    "index_put_", "index_select", "isfinite", "le", "linalg_cholesky_ex", "linalg_vector_norm", "log",
    "_log_softmax", "_log_softmax_backward_data", "lt", "max", "mean", "min", "mkldnn_convolution",
    "mm", "mul", "mul_", "mv", "native_batch_norm", "native_batch_norm_backward", "ne", "neg",
    "nll_loss_backward", "nll_loss_forward", "pow", "rsub", "sign", "sqrt", "sub", "sub_", "sum",
    "tanh", "tanh_backward", "threshold_backward", "avg_pool2d", "avg_pool2d_backward", "relu", "relu_",
    "where", "_cholesky_solve_helper", "_linalg_eigh"))


class Trainer:
    """A model of its own with SGD, and SENG when given arguments of it."""

    def __init__(self, options: argparse.Namespace, **seng: Any) -> None:
        torch.manual_seed(0)
        small = options.model == "autoencoder"
        self.model = autoencoder(0) if small else resnet18(classes=10, stem=options.stem)
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9,
                              weight_decay=0.0 if small else 5e-4)
        self.seng = hvd.SENG(self.model, damping=1.0, update_freq=10**9, **seng) if seng else None
        self.distributed = options.ranks > 1
        self.optimizer: Any = sgd
        if self.distributed:
            self.optimizer = hvd.DistributedOptimizer(
                sgd, named_parameters=self.model.named_parameters(), preconditioner=self.seng)
        torch.manual_seed(hvd.rank() if self.distributed else 0)
        self.x = torch.rand(options.batch, 64) if small else torch.randn(options.batch, 3, 32, 32)
        self.y = torch.randint(0, 10, (options.batch,))
        self.loss = self._squared_error if small else self._cross_entropy

    def _squared_error(self) -> torch.Tensor:
        return 0.5 * (self.model(self.x) - self.x).square().sum() / len(self.x)

    def _cross_entropy(self) -> torch.Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def refresh_next(self) -> None:
        """Let the coming step take the curvature anew."""
        assert self.seng is not None
        self.seng.refresh_next()

    def step(self) -> tuple[float, float]:
        """Seconds and CPU seconds of one training step."""
        begin = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        self.loss().backward()
        if self.seng is not None and not self.distributed:
            self.seng.step()
        self.optimizer.step()
        return time.perf_counter() - begin[0], time.process_time() - begin[1]


    def calls(self) -> dict[str, int]:
        """Operators that one training step calls, and those of them that are no views."""
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            self.step()
        seen = {event.key: event.count for event in profiler.key_averages()
                if event.key.startswith("aten::")}
        return {"calls": sum(seen.values()),
                "kernels": sum(count for name, count in seen.items() if name in KERNELS)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times of the kinds of step, by name, in seconds, and SENG's report."""
    settings = {
        "explicit_threshold": options.explicit_threshold, "sketch_size": options.sketch_size,
        "rank": options.rank, "row_sketch": options.row_sketch, "subsample": options.subsample,
        "curvature_dtype": options.curvature_dtype,
    }
    if options.model == "autoencoder":
        settings.update(explicit_threshold=0, sketch=None, uc="exact")
        del settings["sketch_size"]
    couplings = ["block", "lagged"] if options.ranks > 1 else ["block"]
    plain = Trainer(options)
    trainers = {coupling: Trainer(options, coupling=coupling, **settings)
                for coupling in couplings}
    for trainer in (plain, plain, *trainers.values(), *trainers.values()):
        trainer.step()
    times: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    waited: dict[str, float] = dict.fromkeys(couplings, 0.0)

    def turn(name: str, step: Callable[[], tuple[float, float]]) -> None:
        wall, own = step()
        times.setdefault(name, []).append(wall)
        cpu.setdefault(name, []).append(own)

    for _ in range(options.repeats):
        turn("sgd", plain.step)
        for coupling, trainer in trainers.items():
            before = trainer.seng._step.waited
            turn(coupling, trainer.step)
            waited[coupling] += trainer.seng._step.waited - before
    for _ in range(options.refreshes):
        turn("sgd", plain.step)
        for coupling, trainer in trainers.items():
            trainer.refresh_next()
            turn(f"{coupling}, refresh", trainer.step)
    calls = {"sgd": plain.calls()}
    for coupling, trainer in trainers.items():
        calls[coupling] = trainer.calls()
        trainer.refresh_next()
        calls[f"{coupling}, refresh"] = trainer.calls()
    shares = {c: waited[c] / sum(times[c]) for c in couplings}
    report = trainers[couplings[0]].seng.report()
    for trainer in trainers.values():
        trainer.seng.close()
    return {"times": times, "cpu_times": cpu, "waiting_share": shares, "report": report, "settings": settings,
            "calls": calls, "parameters": sum(p.numel() for p in plain.model.parameters())}


def summarise(result: dict[str, Any], update_freq: int) -> dict[str, Any]:
    """Ratios to plain SGD."""
    base = {f.__name__: f(result["times"]["sgd"]) for f in (median, min)}
    base_cpu = median(result["cpu_times"]["sgd"])
    ratios: dict[str, dict[str, float]] = {}
    for name, taken in result["times"].items():
        ratios[name] = {"seconds": median(taken),
                        "ratio": median(taken) / base["median"],
                        "ratio_of_fastest": min(taken) / base["min"],
                        "ratio_of_cpu": median(result["cpu_times"][name]) / base_cpu}
    for name in [n for n in ratios if f"{n}, refresh" in ratios]:
        for key in ("ratio", "ratio_of_fastest", "ratio_of_cpu"):
            between, refresh = ratios[name][key], ratios[f"{name}, refresh"][key]
            ratios.setdefault(f"{name}, amortised over {update_freq}", {})[key] = (
                between + (refresh - between) / update_freq)
    return ratios


def show(result: dict[str, Any], ratios: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the tables."""
    console = Console(width=180)
    if options.report:
        console.print(Text.from_ansi(str(result["report"])))
    report = result["report"]
    console.print(f"curvature: {report['bytes']:,} bytes held; {report['formula_bytes']:,} by the "
                  "formulas of SENG Table 2 (the difference: small systems and row numbers)")
    name = "autoencoder" if options.model == "autoencoder" else f"ResNet-18 ({options.stem} stem)"
    table = Table(title=f"{name}, {result['parameters']:,} parameters, "
                        f"batch {options.batch}, {options.ranks} ranks of {options.threads} threads")
    for column in ("step", "seconds", "ratio to SGD", "of fastest", "of CPU time", "calls", "kernels",
                   "waiting"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, row in ratios.items():
        share = result["waiting_share"].get(name)
        table.add_row(name, f"{row['seconds']:.3f}" if "seconds" in row else "",
                      f"{row['ratio']:.3f}", f"{row['ratio_of_fastest']:.3f}",
                      f"{row['ratio_of_cpu']:.3f}",
                      *(str(result["calls"].get(name, {}).get(key, "")) for key in ("calls", "kernels")),
                      "" if share is None or options.ranks == 1 else f"{share:.1%}")
    console.print(table)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what goes into the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=("resnet18", "autoencoder"), default="resnet18")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, help="a rank; 2 for one rank with resnet18, else 1")
    parser.add_argument("--batch", type=int, help="32, with autoencoder 200")
    parser.add_argument("--stem", choices=("cifar", "imagenet"), default="cifar")
    parser.add_argument("--repeats", type=int, help="15, with autoencoder 300")
    parser.add_argument("--refreshes", type=int, help="5, with autoencoder 300")
    parser.add_argument("--update-freq", type=int, default=200)
    parser.add_argument("--explicit-threshold", type=int, default=100_000)
    parser.add_argument("--sketch-size", type=int, default=262_144)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--row-sketch", type=int, default=128)
    parser.add_argument("--subsample", type=int)
    parser.add_argument("--curvature-dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--report", action="store_true", help="print SENG's report too")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    small = options.model == "autoencoder"
    options.threads = options.threads or (2 if options.ranks == 1 and not small else 1)
    options.batch = options.batch or (200 if small else 32)
    options.repeats = options.repeats or (300 if small else 15)
    options.refreshes = options.refreshes or (300 if small else 5)
    if options.ranks > 1 and not under_mpirun():
        command = mpirun(options.ranks, "benchmarks.seng_step",
                         arguments if arguments is not None else sys.argv[1:])
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)
    torch.set_num_threads(options.threads)
    if options.ranks > 1:
        hvd.init()
    result = measure(options)
    ratios = summarise(result, options.update_freq)
    summary = {"benchmark": "seng_step", "model": options.model, "ratios": ratios, "stem": options.stem,
               "batch": options.batch, "ranks": options.ranks, "threads": options.threads,
               "settings": result["settings"], "waiting_share": result["waiting_share"],
               "calls": result["calls"], "bytes": result["report"]["bytes"], "times": result["times"],
               "cpu_times": result["cpu_times"],
               "formula_bytes": result["report"]["formula_bytes"]}
    if options.ranks == 1 or hvd.rank() == 0:
        show(result, ratios, options)
        if options.json:
            options.json.write_text(json.dumps(summary, indent=1))
    return summary


if __name__ == "__main__":
    main()

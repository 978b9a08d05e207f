"""What each rank measures: an exchange and a whole step of every way to exchange gradients, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import hvd_ext.torch as hvd
from examples.resnet import resnet18
from hvd_ext.planning.workload import FORWARD
from tests.cluster.hosts import sent_bytes

PLAIN_MPI = "mpi4py Allreduce"
DENSE = "dense"
WIDTH, PARAMETERS = 64, 11.2e6  # of a ResNet-18 for ten classes


def ways() -> dict[str, dict[str, Any]]:
    """The rows: arguments of ``hvd.DistributedOptimizer`` by name."""
    topk = hvd.Compression.topk(0.01)
    return {
        DENSE: {},
        "fp16": {"compression": hvd.Compression.fp16},
        "PowerSGD, rank 4": {"compression": hvd.Compression.powersgd(4)},
        "delay compensation": {"op": hvd.DelayCompensated()},
        "delay compensation, by rank": {"op": hvd.DelayCompensated(order="rank")},
        "TopK 1 %": {"compression": topk},
        "TopK 1 %, sparse allreduce": {
            "compression": hvd.Compression.topk(0.01, exchange="sparse_allreduce")},
        "overlap": {"overlap": hvd.DelayedUpdate()},
        "overlap, fp16": {"overlap": hvd.DelayedUpdate(), "compression": hvd.Compression.fp16},
        "overlap, delay compensation": {"overlap": hvd.DelayedUpdate(), "op": hvd.DelayCompensated()},
        "overlap, TopK 1 %": {"overlap": hvd.DelayedUpdate(), "compression": topk},
        "rank0": {"server": "rank0"},
        "sharded": {"server": "sharded"},
        "sharded, fp16": {"server": "sharded", "compression": hvd.Compression.fp16},
        "TopK 1 %, rank0": {"server": "rank0", "compression": topk},
        "TopK 1 %, sharded": {"server": "sharded", "compression": topk},
        "sharded, reply fp16": {"server": hvd.Server("sharded", downlink=hvd.Compression.fp16)},
        "TopK 1 %, rank0, reply TopK": {"server": hvd.Server("rank0", downlink=topk), "compression": topk},
        "TopK 1 %, sharded, reply TopK": {"server": hvd.Server("sharded", downlink=topk),
                                          "compression": topk},
    }


class Layer(torch.autograd.Function):
    """Hands its input on; in the backward pass it takes its time and yields a gradient made before."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor,
                seconds: float) -> torch.Tensor:
        ctx.gradient, ctx.seconds = gradient, seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        time.sleep(ctx.seconds)
        return grad, ctx.gradient, None, None


class Way:
    """One row: the parameters of a ResNet-18 under an optimizer of its own."""

    def __init__(self, number: int, options: dict[str, Any], gradients: Sequence[torch.Tensor]) -> None:
        self.gradients, self.options = gradients, options
        self.parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
        self.numel = sum(g.numel() for g in gradients)
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(self.parameters, lr=1e-3),
            named_parameters=[(f"way{number}.{i}", p) for i, p in enumerate(self.parameters)], **options)

    def step(self, compute: float) -> None:
        """A training step whose forward and backward pass take ``compute`` seconds and no core."""
        time.sleep(FORWARD * compute)
        x = torch.zeros(1, requires_grad=True)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            share = (1 - FORWARD) * compute * parameter.numel() / self.numel
            x = Layer.apply(x, parameter, gradient, share)
        x.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def prepare(self) -> int:
        """Before a step is timed: with ``overlap=`` have an exchange on its way that the step will wait for.

        Returns how many exchanges there will have been.
        """
        if "overlap" not in self.options:
            return 1
        self.step(0.0)
        return 2

    def settle(self) -> None:
        """After it: let no exchange run beside what is measured next."""
        if "overlap" in self.options:
            self.optimizer.flush()


def shapes_of(parameters: float) -> list[torch.Size]:
    """Of a ResNet-18 that is made as wide as gives about so many parameters."""
    width = max(1, round(WIDTH * (parameters / PARAMETERS) ** 0.5))
    return [p.shape for p in resnet18(classes=10, width=width).parameters()]


def measure(turns: int, steps: int, only: Sequence[str], parameters: float = PARAMETERS) -> dict[str, Any]:
    """Seconds and bytes sent of every turn, by row; called on all ranks.

    An exchange is a step without compute: all gradients there at once, then the weights updated.
    """
    generator = torch.Generator().manual_seed(hvd.rank())
    shapes = shapes_of(parameters)
    gradients = [torch.randn(shape, generator=generator) * 0.01 for shape in shapes]
    rows = {name: Way(number, options, gradients) for number, (name, options) in enumerate(ways().items())
            if not only or name in only or name == DENSE}
    calls: dict[str, Callable[[float], Any]] = {PLAIN_MPI: _plain_mpi(gradients)}
    calls.update({name: row.step for name, row in rows.items()})
    exchange: dict[str, list[tuple[float, int]]] = {name: [] for name in calls}
    for turn in range(turns + 2):  # the first ones are for memory and plans
        for name, call in calls.items():
            figure = _timed(call, 0.0, rows.get(name))
            if turn >= 2:
                exchange[name].append(figure)
    slowest = hvd.allreduce(torch.tensor([s for s, _ in exchange[DENSE]]), op=hvd.Max, name="slowest")
    compute = statistics.median(slowest.tolist())
    step: dict[str, list[tuple[float, int]]] = {name: [] for name in rows}
    for turn in range(steps + 1):
        for name, row in rows.items():
            figure = _timed(row.step, compute, row)
            if turn:
                step[name].append(figure)
    return {"exchange": exchange, "step": step, "compute": compute,
            "parameters": sum(g.numel() for g in gradients)}


def _plain_mpi(gradients: Sequence[torch.Tensor]) -> Callable[[float], None]:
    from mpi4py import MPI

    flat = np.concatenate([g.numpy().ravel() for g in gradients])
    result = np.empty_like(flat)
    return lambda compute: MPI.COMM_WORLD.Allreduce(flat, result)


def _timed(call: Callable[[float], Any], compute: float, row: Way | None) -> tuple[float, int]:
    """Seconds, and bytes that this host sent until all ranks were through."""
    hvd.barrier()
    sent = sent_bytes()
    exchanges = 1 if row is None else row.prepare()
    began = time.perf_counter()
    call(compute)
    seconds = time.perf_counter() - began
    hvd.barrier()
    moved = sent_bytes() - sent
    if row is not None:
        row.settle()
    return seconds, moved // exchanges

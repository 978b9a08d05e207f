"""Train a classifier of handwritten digits on any number of ranks, with or without the extensions.

    horovodrun -np 2 python -m examples.torch_digits --op delay --virtual-workers 16

``--lr`` is the learning rate of one worker's step: large batches of M workers take M times as much
(linear scaling), so the same value compares all of them with sequential SGD.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import hvd_ext.torch as hvd
from examples.digits import Deal, Digits
from examples.digits_run import Run, parse, run


def make_model(hidden: int, seed: int) -> torch.nn.Module:
    """64 pixels, one hidden layer, 10 classes."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, hidden), torch.nn.ReLU(),
                               torch.nn.Linear(hidden, 10))


def make_optimizer(args: argparse.Namespace, model: torch.nn.Module, deal: Deal) -> Any:
    """The optimizer of the command line: an ordinary one, and the extensions asked for."""
    # Adaptive steps do not grow with the batch; those of SGD do.
    scaled = args.lr * deal.workers
    inner = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=scaled),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=scaled, momentum=0.9),
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=args.lr),
        "amsgrad": lambda: hvd.AMSGrad(model.parameters(), lr=args.lr),
    }[args.optimizer]()
    op = {
        "average": lambda: hvd.Average,
        "adasum": lambda: hvd.Adasum,
        "delay": lambda: hvd.DelayCompensated(args.lam, adaptive=not args.constant_lam,
                                              virtual_workers="microbatch"),
    }[args.op]()
    compression = {
        "none": lambda: hvd.Compression.none,
        "fp16": lambda: hvd.Compression.fp16,
        "topk": lambda: hvd.Compression.topk(args.ratio),
    }[args.compression]()
    preconditioner = None
    if args.preconditioner == "seng":
        preconditioner = hvd.SENG(model, damping=args.damping, update_freq=args.update_freq)
    return hvd.DistributedOptimizer(
        inner, named_parameters=model.named_parameters(), compression=compression, op=op,
        backward_passes_per_step=deal.passes, preconditioner=preconditioner, server=args.server,
    )


def error_percent(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of wrong answers, in percent; each rank judges its part and the counts are summed."""
    part = slice(hvd.rank(), None, hvd.size())
    with torch.no_grad():
        wrong = (model(x[part]).argmax(1) != y[part]).sum().double()
    return float(hvd.allreduce(wrong, op=hvd.Sum, name="wrong")) * 100 / len(y)


def train(args: argparse.Namespace, seed: int, data: Digits, advance: Callable[[], None]) -> Run:
    """One run. The test error after each epoch, in percent, and the seconds it took."""
    deal = Deal(args.virtual_workers or hvd.size(), hvd.size())
    model = make_model(args.hidden, seed)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = make_optimizer(args, model, deal)
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    test_x, test_y = torch.from_numpy(data.test_x), torch.from_numpy(data.test_y)
    errors = []
    started = time.perf_counter()
    for epoch in range(args.epochs):
        for step in torch.from_numpy(deal.microbatches(len(x), epoch, seed, hvd.rank())):
            optimizer.zero_grad()
            for picked in step:
                loss = torch.nn.functional.cross_entropy(model(x[picked]), y[picked])
                (loss / deal.passes).backward()
            optimizer.step()
        errors.append(error_percent(model, test_x, test_y))
        advance()
    return {"seed": seed, "test_error": errors[-1], "test_errors": errors,
            "seconds": time.perf_counter() - started, "workers": deal.workers}


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for; rank 0 reports."""
    args = parse("torch_digits", __doc__, arguments)
    hvd.init()
    torch.set_num_threads(1)
    run(args, train, rank=hvd.rank(), size=hvd.size())


if __name__ == "__main__":
    main()

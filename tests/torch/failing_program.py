"""A training in which rank 1 fails in some way; ``python -m tests.torch.failing_program HOW METHOD``.

With an ending of ``ENDINGS`` as HOW, rank 1 goes on to another collective instead. Both ranks catch the
errors of their waits, and end so.
"""

from __future__ import annotations

import os
import sys

import torch

import hvd_ext.torch as hvd

ENDINGS = {"end": lambda: None, "exit": lambda: sys.exit(0), "_exit": lambda: os._exit(0),
           "shutdown": hvd.shutdown}


def main(how: str, method: str) -> None:
    hvd.init()
    rank = hvd.rank()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    options = {"topk": lambda: {"compression": hvd.Compression.topk(0.5, min_size=0)},
               "powersgd": lambda: {"compression": hvd.Compression.powersgd(min_compression=1.0)},
               "seng": lambda: {"preconditioner": hvd.SENG(model, damping=0.1)},
               "late": lambda: {"overlap": hvd.DelayedUpdate()},
               "sharded": lambda: {"server": "sharded"}}.get(method, dict)()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                         named_parameters=model.named_parameters(), **options)
    if how in ENDINGS:
        try:
            train(model, optimizer, 3)
            if hvd.rank() == 1:
                hvd.allreduce(torch.ones(1), name="something else")
            else:
                train(model, optimizer, 1)
        except hvd.HorovodInternalError as error:
            print(f"rank {rank} caught: {error}", flush=True)  # os._exit() does not
        ENDINGS[how]()
        return
    for step in range(1000):
        if hvd.rank() == 1 and step == 3:
            if how == "raise":
                raise ZeroDivisionError("a bug of one rank")
            hvd.join()
            return
        train(model, optimizer, 1)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 6)).sum().backward()
        optimizer.step()


if __name__ == "__main__":
    main(*sys.argv[1:])

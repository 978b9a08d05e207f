"""A training in which rank 1 fails in some way; ``python -m tests.torch.failing_program HOW METHOD``."""

from __future__ import annotations

import sys

import torch

import hvd_ext.torch as hvd


def main(how: str, method: str) -> None:
    hvd.init()
    torch.set_num_threads(1)
    model = torch.nn.Linear(6, 3)
    options = {"topk": {"compression": hvd.Compression.topk(0.5, min_size=0)}}.get(method, {})
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                         named_parameters=model.named_parameters(), **options)
    for step in range(1000):
        if hvd.rank() == 1 and step == 3:
            if how == "raise":
                raise ZeroDivisionError("a bug of one rank")
            hvd.join()
            return
        optimizer.zero_grad()
        model(torch.ones(4, 6)).sum().backward()
        optimizer.step()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A training whose rank 1 takes its last step when rank 0 is about to end, in one of three ways.

``python -m tests.torch.leaving_program HOW METHOD FOLDER``. HOW is "end", "shutdown", or "drop": the
optimizer is gone before the script ends.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import torch

import hvd_ext.torch as hvd

METHODS = {"plain": lambda: {}, "fp16": lambda: {"compression": hvd.Compression.fp16},
           "rank0": lambda: {"server": "rank0"}}


def main(how: str, method: str, folder: str) -> None:
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ends = Path(folder) / "ends"
    train(method, ends, keep=how != "drop")
    if hvd.rank() == 0:
        ends.touch()
    if how == "shutdown":
        hvd.shutdown()


def train(method: str, ends: Path, keep: bool) -> None:
    model = torch.nn.Linear(6, 3)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                         named_parameters=model.named_parameters(),
                                         overlap=hvd.DelayedUpdate(),
                                         **METHODS[method]())
    for last in (False, False, True):
        if last and hvd.rank() == 1:
            wait_for_file(ends)
            time.sleep(3.0)  # rank 0 has time to leave
        optimizer.zero_grad()
        model(torch.ones(4, 6)).sum().backward()
        optimizer.step()
    if keep:
        KEPT.append(optimizer)
    else:
        del optimizer
        gc.collect()


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.01)


KEPT: list[torch.optim.Optimizer] = []

if __name__ == "__main__":
    main(*sys.argv[1:])

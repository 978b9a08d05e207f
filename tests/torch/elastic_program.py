"""A training under Horovod elastic; what its ranks saw goes into files of one folder.

``horovodrun ... python -m tests.torch.elastic_program METHOD FOLDER``
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

import hvd_ext.torch as hvd

STEPS = 24
JOIN, KILL = 6, 14  # the steps at which a host is added, and its rank killed
TWO, THREE = "localhost:2\n", "localhost:2\n127.0.0.1:1\n"


def options(method, model):
    if method == "delay":
        return {"op": hvd.DelayCompensated(0.5)}
    if method == "topk":
        return {"compression": hvd.Compression.topk(0.25, min_size=0)}
    if method == "seng":
        return {"preconditioner": hvd.SENG(model, damping=0.5, update_freq=3)}
    return {}


def main(method, folder):
    hvd.init()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5),
                                         named_parameters=model.named_parameters(),
                                         **options(method, model))
    teacher = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))

    def loss_at(step, rank):
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(100 * step + rank))
        return torch.nn.functional.mse_loss(model(x), (x @ teacher).sin())

    @hvd.elastic.run
    def train(state):
        while state.step < STEPS:
            joined = os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1"
            if state.step == JOIN and hvd.rank() == 0 and not (folder / "calm").exists():
                (folder / "hosts").write_text(THREE)
            if state.step >= KILL and joined:
                (folder / "hosts").write_text(TWO)
                os.kill(os.getpid(), signal.SIGKILL)
            if state.step == JOIN + 1 and hvd.size() == 2 and not (folder / "calm").exists():
                time.sleep(2.0)  # the driver looks once a second
            optimizer.zero_grad()
            loss = loss_at(state.step, hvd.rank())
            loss.backward()
            optimizer.step()
            state.step += 1
            hvd.assert_replicas_equal(model)
            with (folder / f"seen.{os.environ['HOROVOD_HOSTNAME']}.{hvd.rank()}").open("a") as file:
                file.write(f"{state.step} {hvd.size()} {loss.item()!r}\n")
            state.commit()

    train(hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0))
    if hvd.rank() == 0:
        with torch.no_grad():
            final = sum(float(loss_at(10_000 + k, 0)) for k in range(8)) / 8
        (folder / "result").write_text(repr({"loss": final, "report": optimizer.report()}))
    hvd.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""A training under Horovod elastic of which one rank is killed; what was restored, and the end.

``horovodrun ... python -m tests.soak.elastic METHOD FOLDER HOST STEP SHARE``, and in one process
``python -m tests.soak.elastic METHOD FOLDER``: goes on from what the disturbed run had after its first step.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

import hvd_ext.torch as hvd
from tests.soak.fault_injection import Striker
from tests.torch.checkpointed import build, digest, train_step

STEPS = 16
HOSTS = "localhost:1\n127.0.0.1:1\n"


def weights(model, optimizer):
    """A digest of the weights and of the optimizer's moments."""
    return digest(model, _Plain(optimizer))


class _Plain:
    """An optimizer without what its extensions keep."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def state_dict(self):
        return {name: value for name, value in self.optimizer.state_dict().items() if name == "state"}


def disturbed(method, folder, host, step, share):
    hvd.init()
    model, optimizer, scheduler = build(method)
    here = os.environ["HOROVOD_HOSTNAME"]
    striker = Striker(step, share, signal.SIGKILL, 1) if here == host else None
    committed = folder / f"committed.{here}"

    @hvd.elastic.run
    def train(state):
        entered, alone = state.step, hvd.size() == 1
        if alone:
            (folder / "restored").write_text(f"{state.step} {weights(model, optimizer)}")
        while state.step < STEPS:
            if striker is not None and hvd.size() == 2:
                striker.before_step(state.step)
            train_step(model, optimizer, scheduler, state.step)
            state.step += 1
            if alone and state.step == entered + 1:
                torch.save({"step": state.step, "model": model.state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "scheduler": scheduler.state_dict()}, folder / "after")
            with committed.open("a") as file:
                file.write(f"{state.step} {weights(model, optimizer)}\n")
            state.commit()

    train(hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0))
    if hvd.rank() == 0:
        (folder / "end").write_text(weights(model, optimizer))
    hvd.shutdown()


def undisturbed(method, folder):
    hvd.init()
    model, optimizer, scheduler = build(method)
    after = torch.load(folder / "after", weights_only=True)
    model.load_state_dict(after["model"])
    optimizer.load_state_dict(after["optimizer"])
    scheduler.load_state_dict(after["scheduler"])
    for number in range(after["step"], STEPS):
        train_step(model, optimizer, scheduler, number)
    (folder / "expected").write_text(weights(model, optimizer))


if __name__ == "__main__":
    place = Path(sys.argv[2])
    if len(sys.argv) == 3:
        undisturbed(sys.argv[1], place)
    else:
        disturbed(sys.argv[1], place, sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))

"""Trainings under Horovod elastic, one per extension; what its ranks saw goes into files of one folder.

``horovodrun ... python -m tests.torch.elastic_program FOLDER``; ``train_all()`` is the run without changes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

import hvd_ext.torch as hvd

STEPS = 30
TWO, THREE = "localhost:2\n", "localhost:2\n127.0.0.1:1\n"
# From this step on the discovery script names these hosts. The last host does not leave: it is killed.
HOSTS = {0: TWO, 5: THREE, 11: TWO, 17: THREE}
KILL = 23


def topk():
    return hvd.Compression.topk(0.25, min_size=0)


METHODS = {
    "plain": lambda model: {},
    "delay": lambda model: {"op": hvd.DelayCompensated(0.5)},
    "topk": lambda model: {"compression": topk()},
    "topk_sparse": lambda model: {"compression": hvd.Compression.topk(
        0.25, min_size=0, exchange="sparse_allreduce")},
    "powersgd": lambda model: {"compression": hvd.Compression.powersgd(1, min_compression=1.0)},
    "seng": lambda model: {"preconditioner": hvd.SENG(model, damping=0.5, update_freq=3)},
    "lagged": lambda model: {"preconditioner": hvd.SENG(model, damping=0.5, update_freq=3,
                                                        coupling="lagged")},
    "rank0": lambda model: {"server": "rank0"},
    "sharded": lambda model: {"server": "sharded"},
    "topk_sharded": lambda model: {"server": "sharded", "compression": topk()},
    "reply": lambda model: {"server": hvd.Server("sharded", downlink=topk())},
    "topk_late": lambda model: {"overlap": hvd.DelayedUpdate(1.0), "compression": topk()},
    "delay_rank0": lambda model: {"server": "rank0", "op": hvd.DelayCompensated(0.5)},
}


def make(method):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    options = METHODS[method](model)
    if "server" in options or method == "plain":
        inner = torch.optim.Adam(model.parameters(), lr=0.02)
    else:
        inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    return model, hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters(), **options)


def loss_at(model, step, rank):
    teacher = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(100 * step + rank))
    return torch.nn.functional.mse_loss(model(x), (x @ teacher).sin())


def held(state, method):
    """What a commit holds that must be the same whoever is there: moments, exact weights, MeanSquare."""
    committed = state._handlers[f"optimizer_{method}"].committed
    return {"wrapped": committed["wrapped"]["state"], "reply": (committed["server"] or {}).get("reply"),
            "mean_square": committed["reducer"].get("mean_square", {})}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def train_all(folder=None, methods=tuple(METHODS)):
    """Final loss and report by method; with a folder hosts come and go as HOSTS says."""
    made = {method: make(method) for method in methods}
    things = {f"model_{method}": model for method, (model, _) in made.items()}
    things |= {f"optimizer_{method}": optimizer for method, (_, optimizer) in made.items()}
    state = hvd.elastic.TorchState(**things, step=0)
    before = {}

    def meet_hosts():
        """Wait, at the steps where hosts come or leave, until they have."""
        wanted = HOSTS[max(step for step in HOSTS if step <= state.step)]
        if hvd.rank() == 0 and state.step in HOSTS:
            (folder / "hosts").write_text(wanted)
        while state.step in HOSTS and hvd.size() != wanted.count("\n") + 1:
            time.sleep(0.1)
            state.check_host_updates()

    @hvd.elastic.run
    def train(state):
        for method, kept in before.items():  # a rank that has stayed: what it committed is there still
            assert same(kept, held(state, method)), method
        while state.step < STEPS:
            if folder is not None:
                meet_hosts()
                if state.step == KILL and os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1":
                    (folder / "hosts").write_text(TWO)
                    os.kill(os.getpid(), signal.SIGKILL)
            losses = []
            for model, optimizer in made.values():
                optimizer.zero_grad()
                loss = loss_at(model, state.step, hvd.rank())
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                hvd.assert_replicas_equal(model)
            state.step += 1
            if folder is not None:
                with (folder / f"seen.{os.environ['HOROVOD_HOSTNAME']}.{hvd.rank()}").open("a") as file:
                    file.write(f"{state.step} {hvd.size()} {losses}\n")
            state.save()
            before.update({method: held(state, method) for method in made})
            state.check_host_updates()

    train(state)
    with torch.no_grad():
        return {method: {"loss": sum(float(loss_at(model, 10_000 + k, 0)) for k in range(8)) / 8,
                         "lost_residuals": optimizer.report().get("dropped_residuals")}
                for method, (model, optimizer) in made.items()}


def main(folder, *methods):
    hvd.init()
    result = train_all(folder, methods)
    if hvd.rank() == 0:
        (folder / "result").write_text(repr(result))
    hvd.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

"""What the ranks of the cluster tests do."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("plain", "fp16", "delay", "topk", "powersgd", "seng")
SERVERS = (None, "replicated", "rank0", "sharded")
STEPS = 4
HOSTS = 3


def extensions(hvd: Any, method: str, model: Any) -> dict[str, Any]:
    """Arguments of DistributedOptimizer."""
    return {
        "plain": lambda: {}, "fp16": lambda: {"compression": hvd.Compression.fp16},
        "delay": lambda: {"op": hvd.DelayCompensated(lam=0.5)},
        "topk": lambda: {"compression": hvd.Compression.topk(0.25, min_size=0)},
        "powersgd": lambda: {"compression": hvd.Compression.powersgd(rank=2)},
        "seng": lambda: {"preconditioner": hvd.SENG(model, damping=0.1, update_freq=2)},
    }[method]()


def make(method: str, server: str | None) -> tuple[Any, Any]:
    """A small model and its optimizer."""
    import torch

    import hvd_ext.torch as hvd

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 41), torch.nn.Tanh(), torch.nn.Linear(41, 7))
    options = extensions(hvd, method, model)
    optimizer = hvd.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), server=server,
                                         named_parameters=model.named_parameters(), **options)
    return model, optimizer


def step(model: Any, optimizer: Any, number: int, rank: int) -> None:
    """One step on a batch of this rank's own."""
    import torch

    rng = np.random.default_rng([rank, number])
    x, y = (torch.from_numpy(rng.normal(size=(8, n)).astype("float32")) for n in (30, 7))
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()


def every_way() -> dict[tuple[str, str | None], np.ndarray]:
    """The weights after some steps by method and server; the same on all ranks."""
    import hvd_ext.torch as hvd

    found = {}
    for method in METHODS:
        for server in SERVERS:
            model, optimizer = make(method, server)
            for number in range(STEPS):
                step(model, optimizer, number, hvd.rank())
            hvd.assert_replicas_equal(model)
            found[method, server] = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    return found


def place() -> tuple[str, int, int]:
    """Host, rank, and ranks on this host; after an allreduce over all of them."""
    import horovod.torch as hvd
    import torch

    assert float(hvd.allreduce(torch.tensor(1.0), op=hvd.Sum)) == hvd.size()
    return socket.gethostname(), hvd.rank(), hvd.local_size()


def moved(numel: int) -> tuple[int, float]:
    """Bytes that this host sent for an allreduce of float32, and its seconds."""
    import horovod.torch as hvd
    import torch

    from tests.cluster.hosts import sent_bytes

    data = torch.ones(numel)
    hvd.allreduce(data, name="warm")
    hvd.barrier()
    before, began = sent_bytes(), time.perf_counter()
    hvd.allreduce(data, name="warm")
    seconds = time.perf_counter() - began
    hvd.barrier()
    return sent_bytes() - before, seconds


def wait_for_cut(folder: Path, rank: int = 0) -> None:
    """Ask the test to cut a host, and go on when it has."""
    (folder / f"ready{rank}").touch()
    while not (folder / "cut").exists():
        time.sleep(0.02)


def cut_when_asked(cluster: Any, folder: Path, host: str, asking: int = 1) -> None:
    """The test's end of :func:`wait_for_cut`, in a thread: cuts when so many have asked."""
    def run() -> None:
        while len(list(folder.glob("ready*"))) < asking:
            time.sleep(0.02)
        cluster.cut(host)
        (folder / "cut").touch()

    threading.Thread(target=run, daemon=True).start()


def cut_off(method: str, server: str | None, folder: str) -> None:
    """Train; before the third step a host is cut off. Returns only if nobody noticed."""
    import hvd_ext.torch as hvd

    model, optimizer = make(method, server)
    for number in range(5):
        if number == 2:
            wait_for_cut(Path(folder), hvd.rank())
        step(model, optimizer, number, hvd.rank())


def busy(seconds: float) -> bool:
    """Rank 0 is at work for longer than the limit; the others wait for it."""
    import hvd_ext.torch as hvd
    from hvd_ext.watchdog.watchdog import WATCH

    model, optimizer = make("plain", None)
    for number in range(3):
        if number == 2 and hvd.rank() == 0:
            end, total = time.monotonic() + seconds, 0
            while time.monotonic() < end:
                total += sum(range(1000))
        step(model, optimizer, number, hvd.rank())
    return WATCH.verdict is None


def serve(options: dict[str, Any], steps: int, folder: str | None) -> dict[str, Any]:
    """A parameter server's run; its second worker is cut off before its sixth push if asked."""
    from tests.async_ps.runs import train

    def lose(ps: Any, batch: int, gradient: Any) -> None:
        if folder is not None and batch == 5 and ps.worker == 1:
            wait_for_cut(Path(folder))

    return train(options, steps, pause=0.01, hook=lose)

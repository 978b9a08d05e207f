"""Trainings that save and load checkpoints, step by step reproducible; run by tests and by the soak."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

import hvd_ext.torch as hvd

METHODS = ("plain", "fp16", "delay", "topk", "powersgd", "seng", "sharded", "rank0")


def build(method, seed=0):
    """Model, distributed optimizer and schedule; every extension small enough for steps of milliseconds."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.BatchNorm1d(9), torch.nn.Tanh(),
                                torch.nn.Linear(9, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    options = {
        "fp16": lambda: {"compression": hvd.Compression.fp16},
        "delay": lambda: {"op": hvd.DelayCompensated()},
        "topk": lambda: {"compression": hvd.Compression.topk(0.2, min_size=0)},
        "powersgd": lambda: {"compression": hvd.Compression.powersgd(rank=1)},
        "seng": lambda: {"preconditioner": hvd.SENG(model, damping=0.2, update_freq=5)},
        "sharded": lambda: {"server": "sharded"},
        "rank0": lambda: {"server": "rank0"},
    }.get(method, dict)()
    momentum = 0.0 if method == "delay" else 0.9
    inner = torch.optim.Adam(model.parameters(), lr=0.01) if method in ("sharded", "rank0") else \
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    optimizer = hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters(), **options)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)


def train_step(model, optimizer, scheduler, number):
    """Step ``number`` with the batch of this rank, which depends on nothing else."""
    rng = np.random.default_rng([hvd.rank(), number])
    x, y = (torch.from_numpy(rng.normal(size=(8, n)).astype("float32")) for n in (6, 3))
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    scheduler.step()


def digest(model, optimizer):
    """Of all that this rank has: weights, buffers, moments, what the extensions keep."""
    found = hashlib.sha256()
    _add(found, [dict(model.state_dict()), optimizer.state_dict()])
    return found.hexdigest()


def _add(found, thing):
    if isinstance(thing, torch.Tensor):
        found.update(str(thing.dtype).encode() + repr(tuple(thing.shape)).encode())
        found.update(thing.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(thing, dict):
        for key in sorted(thing, key=str):
            found.update(str(key).encode())
            _add(found, thing[key])
    elif isinstance(thing, list | tuple):
        for one in thing:
            _add(found, one)
    else:
        found.update(repr(thing).encode())


def run(method, folder, steps, every, *, before_step=lambda number: None, keep=3):
    """Train to ``steps``, going on from what ``folder`` holds; (first step, digest of this rank)."""
    model, optimizer, scheduler = build(method, seed=hvd.rank())  # loading must bring the same to all
    first = 0
    loaded = hvd.load_checkpoint(folder, model=model, optimizer=optimizer)
    if loaded is None:
        hvd.broadcast_parameters(model.state_dict(), 0)
    else:
        first = loaded.step
        scheduler.load_state_dict(loaded.more["scheduler"])
    for number in range(first, steps):
        before_step(number)
        train_step(model, optimizer, scheduler, number)
        if (number + 1) % every == 0:
            hvd.save_checkpoint(folder, number + 1, model=model, optimizer=optimizer, keep=keep,
                                scheduler=scheduler.state_dict())
    hvd.assert_replicas_equal(model)
    return first, digest(model, optimizer)

"""A few training steps of a model: the same weights on all ranks, and how long a step takes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from statistics import median

import torch

import hvd_ext.torch as hvd
from tests.zoo.measure import LAM, B, build, loss_of
from tests.zoo.timm_models import TIMM
from tests.zoo.transformers_models import TRANSFORMERS

MODELS = {**TIMM, **TRANSFORMERS}
TIMED_BATCH = 16
TURNS = 15


def trained(name: str) -> bytes:
    """Weights after a few steps in float32, of data that differs from rank to rank; every rank calls it."""
    model, inputs = build(MODELS[name], torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(hvd.rank())
    inputs = MODELS[name].inputs(B)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seng = hvd.SENG(model.train(), damping=LAM, update_freq=2, name=f"zoo {name}")
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.01), named_parameters=model.named_parameters(),
            preconditioner=seng)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, inputs, MODELS[name].output).backward()
            optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert any(row["held"] != "identity" for row in seng.report()["layers"])
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


def slowed(name: str) -> tuple[float, float]:
    """CPU time of a step between refreshes, and of one with a refresh, over that of a step of SGD.

    A step is the passes over a batch, SENG and SGD, in float32 on one thread; medians of turns in which
    each kind has one.
    """
    model, _ = build(MODELS[name], torch.float32)
    model.train()
    inputs = MODELS[name].inputs(TIMED_BATCH)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def seconds(turn: Callable[[], None] | None) -> float:
        begin = time.process_time()
        sgd.zero_grad()
        loss_of(model, inputs, MODELS[name].output).backward()
        if turn is not None:
            turn()
        sgd.step()
        return time.process_time() - begin

    plain: list[float] = []
    between: list[float] = []
    fresh: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seng = hvd.SENG(model, damping=LAM, update_freq=10**9, name=f"zoo {name}")
        seconds(seng.step)  # finds the samples and checks the gradients, once
        for turn in range(TURNS + 2):
            # A step without SENG between two with it: its hooks are not there then.
            found = seconds(seng.step), seconds(None)
            seng.refresh_next()
            refresh = seconds(seng.step)
            if turn >= 2:
                between.append(found[0])
                plain.append(found[1])
                fresh.append(refresh)
    seng.close()
    return median(between) / median(plain), median(fresh) / median(plain)

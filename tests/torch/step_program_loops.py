"""The operations of ``tests/reference/step_programs.py`` on an optimizer, and the methods to compare."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import hvd_ext.torch as hvd
from tests.reference.step_methods import DAMPING, LR
from tests.reference.step_programs import (
    CLIP,
    FIRST_SCALE,
    GROWTH_INTERVAL,
    MOMENTUM,
    NEW_SIZE,
    new_weights,
)

SHAPES = [(3, 2), (4,)]
SIZE = 10
RHO = 3  # samples of a rank, with SENG


@dataclass(frozen=True)
class Setup:
    """A method.

    Attributes:
        kind: of ``tests.reference.step_methods.Method``, with ``method``: its other attributes.
        options: of ``DistributedOptimizer``.
        model: of ``tests.reference.step_programs.Model``.
        settings: of SENG, if that is the preconditioner.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] | None = None

    def under(self, server: str) -> Setup:
        """The same with ``server=``."""
        return Setup(self.kind, {**self.options, "server": server}, self.model, self.method, self.settings)


def topk(**options):
    return {"compression": hvd.Compression.topk(0.3, min_size=0, **options)}


def powersgd(rank):
    return {"compression": hvd.Compression.powersgd(rank=rank, min_compression=1.0)}


def overlap(lam=0.0):
    return {"overlap": hvd.DelayedUpdate(lam, adaptive=False)}


PARTIAL = {"partial": True}
METHODS = {
    "plain": Setup("plain"),
    "sharded": Setup("plain", {"server": "sharded"}, PARTIAL),
    "rank0": Setup("plain", {"server": "rank0"}),
    "topk": Setup("topk", topk()),
    "topk_sharded": Setup("topk", topk()).under("sharded"),
    "powersgd": Setup("powersgd", powersgd(8), method={"rank": 2}),
    "delay": Setup("delay", {"op": hvd.DelayCompensated(0.8, adaptive=False)}),
    "adaptive": Setup("adaptive", {"op": hvd.DelayCompensated(0.8)}),
    "late": Setup("plain", overlap(), {"late": True}),
    "late_compensated": Setup("plain", overlap(0.4), {"late": True, "late_lam": 0.4}),
    "late_topk": Setup("topk", {**topk(), **overlap()}, {"late": True}),
}
FURTHER = {
    "replicated": Setup("plain").under("replicated"),
    "groups": Setup("plain", {"groups": 1}),
    "sum": Setup("sum", {"op": hvd.Sum}),
    "sum_sharded": Setup("sum", {"op": hvd.Sum, "server": "sharded"}, PARTIAL),
    "fp16": Setup("fp16", {"compression": hvd.Compression.fp16}),
    "downlink": Setup("plain", {"server": hvd.Server("sharded", downlink=hvd.Compression.fp16)},
                      {**PARTIAL, "half_replies": True}),
    "downlink_rank0": Setup("plain", {"server": hvd.Server("rank0", downlink=hvd.Compression.fp16)},
                            {"half_replies": True}),
    "topk_groups": Setup("topk", {**topk(), "groups": 2},
                         method={"apart": True, "buckets": [slice(0, 6), slice(6, 10)]}),
    "topk_owners": Setup("topk_owners", topk(exchange="sparse_allreduce")),
    "topk_rank0": Setup("topk", topk()).under("rank0"),
    "powersgd_rank1": Setup("powersgd", powersgd(1)),
    "powersgd_sharded": Setup("powersgd", powersgd(1)).under("sharded"),
    "adaptive_sharded": Setup("adaptive", {"op": hvd.DelayCompensated(0.8)}).under("sharded"),
    "late_rank0": Setup("plain", overlap(), {"late": True}).under("rank0"),
    "late_powersgd": Setup("powersgd", {**powersgd(1), **overlap()}, {"late": True}),
    "seng": Setup("seng", settings={}),
    "seng_full": Setup("seng_full", settings={"coupling": "full"}),
    "seng_sharded": Setup("seng", settings={}).under("sharded"),
}
METHODS |= FURTHER


def gradient(method, seed, position, rank, size):
    """A rank's gradient of one operation, (size,); with SENG by sample, (RHO, size)."""
    drawn = np.random.default_rng([seed, position, rank])
    if METHODS[method].settings is None:
        return drawn.standard_normal(size)
    x, c = drawn.standard_normal((RHO, 6)), drawn.standard_normal((RHO, 4))
    first = c[:, :3, None] * x[:, None, :2]
    rest = np.tile(drawn.standard_normal(size - SIZE), (RHO, 1))
    return np.concatenate([first.reshape(RHO, 6), c[:, 3:] * x[:, 2:], rest], axis=1)


class TwoLayers(torch.nn.Module):
    """Two linear layers side by side, whose gradients do not depend on the weights."""

    def __init__(self, weights):
        super().__init__()
        self.first, self.second = (torch.nn.Linear(n, m, bias=False, dtype=torch.float64)
                                   for n, m in ((2, 3), (4, 1)))
        with torch.no_grad():
            for parameter, weight in zip(self.parameters(), weights, strict=True):
                parameter.copy_(weight.reshape(parameter.shape))

    def forward(self, x):
        return torch.cat([self.first(x[:, :2]), self.second(x[:, 2:])], dim=1)


class Loop:
    """The same operations on an optimizer."""

    def __init__(self, method, passes, seed, scaled):
        rng, setup = np.random.default_rng(seed), METHODS[method]
        self.method, self.seed = method, seed
        self.partial = hvd.size() > 1 and setup.model.get("partial", False)
        start = [torch.from_numpy(rng.standard_normal(shape)) for shape in SHAPES]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=GROWTH_INTERVAL,
                                           enabled=scaled)
        self.module, options = None, dict(setup.options)
        if setup.settings is None:
            self.parameters = [torch.nn.Parameter(weight) for weight in start]
        else:
            self.module = TwoLayers(start)
            self.parameters = list(self.module.parameters())
            options["preconditioner"] = hvd.SENG(self.module, damping=DAMPING, update_freq=2, sketch=None,
                                                 **setup.settings)
        inner = torch.optim.SGD(self.parameters, lr=LR, momentum=MOMENTUM)
        self.optimizer = hvd.DistributedOptimizer(
            inner, [(f"p{k}", p) for k, p in enumerate(self.parameters)], backward_passes_per_step=passes,
            grad_scaler=self.scaler, **options)
        self.saved, self.sent_back = None, []
        if setup.kind == "topk_owners":
            self.record_entries(self.optimizer._hvd_ext.reducer)

    def record_entries(self, reducer):
        """Keep which entries each reduction sends back."""
        finish = reducer.finish

        def recording():
            good = finish()
            if good:
                self.sent_back.append(np.flatnonzero(np.concatenate(
                    [np.zeros(p.numel()) if p.grad is None else p.grad.numpy().ravel()
                     for p in self.parameters])))
            return good

        reducer.finish = recording

    def run(self, operation, position):
        getattr(self, operation)(position)
        if self.partial and operation in ("step", "step_in_skip", "closure", "scaler_step"):
            self.clear(position)

    def backward(self, position, factor=1.0):
        size = sum(p.numel() for p in self.parameters)
        drawn = gradient(self.method, self.seed, position, hvd.rank(), size)
        if self.module is None:
            parts = torch.from_numpy(drawn).split([p.numel() for p in self.parameters])
            pairs, loss = list(zip(self.parameters, parts, strict=True)), 0.0
        else:
            again = np.random.default_rng([self.seed, position, hvd.rank()])
            x, c = (torch.from_numpy(again.standard_normal((RHO, width))) for width in (6, 4))
            loss = (self.module(x) * c).sum() / RHO
            parts = torch.from_numpy(drawn[0, SIZE:]).split([p.numel() for p in self.parameters[2:]])
            pairs = list(zip(self.parameters[2:], parts, strict=True))
        loss = loss + sum((p.reshape(-1) * part).sum() for p, part in pairs if p.requires_grad)
        self.scaler.scale(loss * factor).backward()

    def overflow(self, position):
        self.backward(position, float("inf") if hvd.rank() == 0 else 1.0)

    def synchronize(self, _):
        self.optimizer.synchronize()

    def step(self, _):
        self.optimizer.step()

    def step_in_skip(self, _):
        with self.optimizer.skip_synchronize():
            self.optimizer.step()

    def unscale(self, _):
        self.scaler.unscale_(self.optimizer)

    def scaler_step(self, _):
        with self.optimizer.skip_synchronize():
            self.scaler.step(self.optimizer)

    def update(self, _):
        self.scaler.update()

    def zero_grad(self, _):
        self.optimizer.zero_grad()

    def clear(self, _):
        for parameter in self.parameters:
            parameter.grad = None

    def clip(self, _):
        hvd.clip_grad_norm_(self.optimizer, CLIP)

    def torch_clip(self, _=None):
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)

    def closure(self, position):
        def closure():
            self.optimizer.zero_grad()
            self.backward(position)
            if self.partial:
                hvd.clip_grad_norm_(self.optimizer, CLIP)
            else:
                self.torch_clip()
            return torch.zeros(())

        self.optimizer.step(closure)

    def flush(self, _):
        self.optimizer.flush()

    def skip_step(self, position):
        self.optimizer.skip_step()
        self.clear(position)

    def add_group(self, position):
        self.clear(position)
        weights = new_weights(len(self.optimizer.param_groups) + 1)
        assert len(weights) == NEW_SIZE
        self.parameters.append(torch.nn.Parameter(torch.from_numpy(weights)))
        self.optimizer.add_param_group({"params": [self.parameters[-1]]})

    def freeze(self, position, *, frozen=True):
        self.clear(position)
        self.parameters[0].requires_grad_(not frozen)

    def unfreeze(self, position):
        self.freeze(position, frozen=False)

    def save(self, _):
        self.saved = copy.deepcopy(self.optimizer.state_dict()), [p.detach().clone() for p in self.parameters]

    def load(self, position):
        state, weights = copy.deepcopy(self.saved)
        self.optimizer.load_state_dict(state)
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)
        self.clear(position)

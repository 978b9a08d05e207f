"""One SENG step of a model, layer by layer against the dense solve from one sample's pass after another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

import hvd_ext.torch as hvd
from tests.zoo.table import Measured

LAM = 0.3
B = 3

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Model:
    """How a model is made, what it is called with (axis 0 is the sample) and what comes out of it.

    ``limit`` is larger where parts of the model compute in float32 whatever its dtype is.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    output: Callable[[Any], torch.Tensor] = lambda out: out
    settings: Mapping[str, Any] = field(default_factory=dict)
    limit: float = 1e-9  # of the error


def loss_of(model: nn.Module, inputs: Inputs, output: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """A mean over the samples, each pulled towards its own size."""
    out = output(model(**inputs)).flatten(1)
    return (out + torch.tanh(out).square()).square().sum() / out.shape[0] / out.shape[1] ** 0.5


def build(one: Model, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Inputs]:
    """The model in evaluation mode, so that samples are apart, with weights that are not at their start."""
    torch.manual_seed(0)
    model = one.make().to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in one.inputs(B).items()}
    return model, inputs


def measure(one: Model) -> Measured:
    """The step in float64, nothing sketched or cut."""
    model, inputs = build(one)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        seng = hvd.SENG(model, **{"damping": LAM, "sketch": None, "rank": 10**6, "uc": "exact",
                                  "update_freq": 2, **one.settings})
        loss_of(model, inputs, one.output).backward()
        g = {p: None if p.grad is None else p.grad.clone() for p in model.parameters()}
        seng.step()
    found = {p: None if p.grad is None else p.grad.clone() for p in model.parameters()}
    report = seng.report()
    seng.close()
    shares: dict[nn.Parameter, list[torch.Tensor]] = {p: [] for p in model.parameters()}
    for i in range(B):
        model.zero_grad()
        # Twice the same one: batch norm's gradient on a CPU (torch 2.13) is wrong for a batch of one whose
        # output gradient comes transposed, as XCiT's does.
        loss_of(model, {name: t[[i, i]] for name, t in inputs.items()}, one.output).backward()
        for p, mine in shares.items():
            mine.append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    error, worst = 0.0, ""
    for layer in seng.layers:
        if layer not in seng.state.systems:
            continue
        u = np.concatenate([torch.stack(shares[p]).flatten(1).numpy() for p in layer.parameters], 1).T
        u = u / np.sqrt(B)
        zero = [g[p] if g[p] is not None else torch.zeros_like(p) for p in layer.parameters]
        flat = np.concatenate([t.flatten().numpy() for t in zero])
        wanted = (flat - u @ np.linalg.solve(LAM * np.eye(B) + u.T @ u, u.T @ flat)) / LAM
        has = np.concatenate([np.full(p.numel(), found[p] is not None) for p in layer.parameters])
        got = np.concatenate([(t if t is not None else torch.zeros_like(p)).flatten().numpy()
                              for p, t in ((p, found[p]) for p in layer.parameters)])
        size = np.linalg.norm(wanted)
        off = np.linalg.norm((got - wanted)[has]) / size if size > 0 else float(np.linalg.norm(got))
        if off > error:
            error, worst = float(off), layer.name
    return Measured(sum(p.numel() for p in model.parameters() if p.requires_grad), report["coverage"],
                    error, worst,
                    tuple(sorted({row["samples"] for row in report["layers"] if row["samples"]})),
                    report["coverage_line"],
                    tuple((cause, one["parameters"]) for cause, one in report["without_rule"].items()),
                    tuple(str(one.message) for one in said))

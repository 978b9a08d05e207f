"""PyTorch for the suite: a few tensors or a network under ``hvd.DistributedOptimizer``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import hvd_ext.torch as hvd
from tests.conformance.references import LR, MU, Tensors
from tests.conformance.trainer import SavedTrainer
from tests.torch import checkpointed
from tests.torch.problems import backward, bits, flat, make_parameters
from tests.torch.sign_reducer import Sign, SignReducer

OUTPUT_AXIS = 0


class TensorsModel(torch.nn.Module):
    """Parameters p0, p1, ... and nothing else."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        for number, parameter in enumerate(make_parameters(shapes, seed=seed, dtype=dtype)):
            self.register_parameter(f"p{number}", parameter)


def _network(dtype: torch.dtype, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.BatchNorm1d(9), torch.nn.Tanh(),
                               torch.nn.Linear(9, 3)).to(dtype)


class Trainer(SavedTrainer):
    """One model with its optimizer; see ``tests/conformance/properties.py``."""

    hvd, state_class, digest_of = hvd, hvd.elastic.TorchState, checkpointed.digest

    def __init__(self, method: Any, shapes: Sequence[tuple[int, ...]], *, options: Any = None,
                 dtype: str = "float64", passes: int = 1, seed: int = 0, process_set: Any = None) -> None:
        if not hasattr(hvd.Compression, "sign"):
            hvd.register_reducer(Sign, SignReducer)
        self.network = method.network
        self.dtype = getattr(torch, dtype)
        self.model = _network(self.dtype, seed) if self.network else TensorsModel(shapes, self.dtype, seed)
        self.parameters = list(self.model.parameters())
        arguments = (options or method.options)(hvd)
        if "seng" in arguments:
            arguments["preconditioner"] = hvd.SENG(self.model, **arguments.pop("seng"))
        if process_set is not None:
            arguments["process_set"] = process_set
        inner = {"sgd": lambda: torch.optim.SGD(self.parameters, LR),
                 "momentum": lambda: torch.optim.SGD(self.parameters, LR, momentum=MU),
                 "amsgrad": lambda: hvd.AMSGrad(self.parameters, LR)}[method.optimizer]()
        self.optimizer = hvd.DistributedOptimizer(
            inner, named_parameters=self.model.named_parameters(), backward_passes_per_step=passes,
            **arguments)

    @property
    def tensors(self) -> Tensors:
        return Tensors(tuple(tuple(p.shape) for p in self.parameters), OUTPUT_AXIS)

    def step(self, passes: Sequence[Sequence[np.ndarray]], *, other_way: bool = False) -> None:
        """One step whose micro-batches have these gradients; odd ranks in the opposite order if other_way."""
        self.optimizer.zero_grad()
        for gradients in passes:
            backward(self.parameters, gradients, reverse=other_way and hvd.rank() % 2 == 1)
        self.optimizer.step()

    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        """One step of the network on a batch."""
        self.optimizer.zero_grad()
        inputs, targets = (torch.from_numpy(one).to(self.dtype) for one in (x, y))
        torch.nn.functional.mse_loss(self.model(inputs), targets).backward()
        self.optimizer.step()

    def weights(self) -> np.ndarray:
        return flat(self.parameters)

    def bits(self) -> bytes:
        return bits(self.parameters)

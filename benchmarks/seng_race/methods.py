"""Who takes part, and the space that each method's trials are drawn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import hvd_ext.torch as hvd
from benchmarks.seng_race.workloads import Problem, Workload

WARM_UP = 20
Values = dict[str, float]
Step = Callable[[torch.Tensor, torch.Tensor], None]
# Turns gradients into directions; given the batch's loss, and what computes that loss again.
Precondition = Callable[[float, Callable[[], torch.Tensor]], None]
Start = Callable[[nn.Module, Values, dict[str, Any]],
                 "tuple[list[torch.optim.Optimizer], Precondition | None]"]


@dataclass(frozen=True)
class Method:
    """A method and its space: from the name of a setting to its limits, tried on a logarithmic scale.

    ``start(model, values, fixed)`` gives the optimizers and, if there is one, what preconditions;
    ``fixed`` are SENG's settings that follow from the model. With ``sees_batch`` it is given the problem in
    place of the model, and what preconditions is given the batch in place of its loss.
    """

    shows: str
    start: Start
    space: dict[str, tuple[float, float]]
    fixed: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None
    sees_batch: bool = False

    def begin(self, problem: Problem, values: Values, workload: Workload) -> Step:
        """A function that takes a training step; the rate rises over the first 20 and stays."""
        optimizers, precondition = self.start(problem if self.sees_batch else problem.model, values,
                                              {**workload.seng, **self.fixed})
        rises = [torch.optim.lr_scheduler.LinearLR(one, 1.0 / WARM_UP, total_iters=WARM_UP)
                 for one in optimizers]

        def step(x: torch.Tensor, y: torch.Tensor) -> None:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = problem.loss(problem.model(x), y)
            loss.backward()
            if self.sees_batch:
                precondition(x, y)
            elif precondition is not None:
                precondition(float(loss.detach()), lambda: problem.loss(problem.model(x), y))
            for optimizer, rise in zip(optimizers, rises, strict=True):
                optimizer.step()
                rise.step()

        return step


def nesterov(model: nn.Module, lr: float) -> torch.optim.SGD:
    """SGD with Nesterov's momentum, by itself and after SENG."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True)


def sgd(model: nn.Module, values: Values, fixed: Any) -> Any:
    """Nesterov's momentum."""
    return [nesterov(model, values["lr"])], None


def adamw(model: nn.Module, values: Values, fixed: Any) -> Any:
    """AdamW."""
    return [torch.optim.AdamW(model.parameters(), values["lr"], betas=(0.9, 0.99))], None


def muon(model: nn.Module, values: Values, fixed: Any) -> Any:
    """Muon for the matrices within the model, AdamW for all else; rates of one scale."""
    matrices = [p for module in model.modules() if isinstance(module, (nn.Linear, nn.MultiheadAttention))
                for p in module.parameters(recurse=False) if p.ndim == 2]
    held = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in held]
    return [torch.optim.Muon(matrices, values["lr"], adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, values["lr"], betas=(0.9, 0.99))], None


def soap(model: nn.Module, values: Values, fixed: Any) -> Any:
    """SOAP of the package pytorch_optimizer: Adam in the eigenbasis of Shampoo's preconditioner."""
    from pytorch_optimizer import SOAP

    return [SOAP(model.parameters(), values["lr"], precondition_frequency=10)], None


def shampoo(model: nn.Module, values: Values, fixed: Any) -> Any:
    """Shampoo of the package pytorch_optimizer, roots every 10 steps."""
    from pytorch_optimizer import ScalableShampoo

    return [ScalableShampoo(model.parameters(), values["lr"], start_preconditioning_step=10,
                            preconditioning_compute_steps=10)], None


def kfac(problem: Problem, values: Values, fixed: Any) -> Any:
    """K-FAC of the package curvlinops, then SGD with Nesterov's momentum; ``rate`` is lr/damping."""
    from benchmarks.seng_race.kfac import KFAC

    damping = values["damping"]
    preconditioner = KFAC(problem.model, problem.loss, damping=damping)
    return [nesterov(problem.model, values["rate"] * damping)], preconditioner.step


def seng(model: nn.Module, values: Values, fixed: dict[str, Any]) -> Any:
    """SENG, then SGD with Nesterov's momentum; ``rate`` is lr/damping, SGD's rate outside of U."""
    damping = values["damping"]
    preconditioner = hvd.SENG(model, damping=damping, **fixed)
    return [nesterov(model, values["rate"] * damping)], lambda loss, again: preconditioner.step()


SGD_RATES, ADAM_RATES = (3e-3, 1.0), (3e-4, 3e-2)
SENG_SPACE = {"rate": (1e-2, 3.0), "damping": (3e-2, 3.0)}
METHODS = {
    "SGD": Method("Nesterov, momentum 0.9", sgd, {"lr": SGD_RATES}),
    "AdamW": Method("β 0.9, 0.99; decay 0.01", adamw, {"lr": ADAM_RATES}),
    "Muon": Method("AdamW for all but matrices", muon, {"lr": ADAM_RATES}),
    "SOAP": Method("basis anew every 10 steps", soap, {"lr": ADAM_RATES}, needs="pytorch_optimizer"),
    "Shampoo": Method("roots anew every 10 steps", shampoo, {"lr": SGD_RATES}, needs="pytorch_optimizer"),
    "K-FAC": Method("factors of each 10th batch, averaged; √damping on each", kfac, SENG_SPACE,
                    needs="curvlinops", sees_batch=True),
    "SENG, every step": Method("curvature of each batch", seng, SENG_SPACE, {"update_freq": 1}),
    "SENG, every 10": Method("curvature of each 10th batch, stale_curvature=\"rescale\"", seng, SENG_SPACE,
                             {"update_freq": 10, "stale_curvature": "rescale"}),
}

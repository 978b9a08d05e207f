"""AMSGrad as SPARS-AMS has it: epsilon inside the root, no bias correction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hvd_ext import checks
from hvd_ext.torch import kernels

STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class AMSGrad(torch.optim.Optimizer):
    """SPARS-AMS Algorithm 1, lines 12 to 16 (Algorithm 2, lines 7 to 10), for dense gradients.

    ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``, ``vhat = max(vhat, v)``,
    ``w = w - lr m / sqrt(vhat + eps)``. ``torch.optim.Adam(amsgrad=True)`` differs: it corrects for
    the start and adds eps outside the root, so its eps of 1e-8 compares to 1e-16 here.

    The state of float16 and bfloat16 parameters is float32, and so is the arithmetic: eps underflows in
    float16, and squares of gradients with it. The weights are rounded once a step.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: learning rate.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to vhat under the root; above 0.
        weight_decay: added to the gradient as ``weight_decay * w``; with ``decoupled_weight_decay``
            the weights shrink by ``lr * weight_decay`` instead, untouched by the moments.
        decoupled_weight_decay: see ``weight_decay``.
        maximize: go up instead of down.
        foreach: update all parameters of a group together; one after another saves memory.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its limits.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, *,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, decoupled_weight_decay: bool = False,
                 maximize: bool = False, foreach: bool = True) -> None:
        checks.check_float("lr", lr, low=0.0)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas must be a pair of numbers, got {betas!r}; pass "
                            "betas=(0.9, 0.999)")
        for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
            checks.check_float(name, beta, low=0.0, high=1.0, open_high=True)
        checks.check_float("eps", eps, low=0.0, open_low=True,
                           hint="it stands under the root with vhat, which is 0 at first")
        checks.check_float("weight_decay", weight_decay, low=0.0)
        for name, value in (("decoupled_weight_decay", decoupled_weight_decay),
                            ("maximize", maximize), ("foreach", foreach)):
            checks.check_bool(name, value)
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
                    "decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize,
                    "foreach": foreach}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if parameter.grad.is_sparse:
                    raise ValueError("AMSGrad takes dense gradients, got a sparse one; make the "
                                     "layer's gradient dense (nn.Embedding(sparse=False))")
                self._prepare_state(parameter)
            if group["foreach"]:
                for same in _group_by_kind(parameters):
                    self._update_parameters(same, group)
            else:
                for parameter in parameters:
                    self._update_parameters([parameter], group)
        return loss

    def _prepare_state(self, parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        if not state:
            for name in STATE:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format,
                                               dtype=_state_dtype(parameter))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict()`` gave, bit for bit."""
        super().load_state_dict(state_dict)  # which casts the state to the parameters' dtype
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = value.to(parameter.device, _state_dtype(parameter), copy=True)

    def _update_parameters(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        parameters = [one for one in parameters if not kernels.update_amsgrad(
            one, one.grad, [self.state[one][name] for name in STATE], group)]
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        moments, squares, largest = ([state[name] for state in states] for name in STATE)
        gradients: Any = [parameter.grad for parameter in parameters]
        weights, dtype = parameters, _state_dtype(parameters[0])
        if dtype != parameters[0].dtype:
            weights = [weight.to(dtype) for weight in parameters]
            gradients = [gradient.to(dtype) for gradient in gradients]
        if group["maximize"]:
            gradients = torch._foreach_neg(gradients)
        if group["weight_decay"] and group["decoupled_weight_decay"]:
            torch._foreach_mul_(weights, 1.0 - lr * group["weight_decay"])
        elif group["weight_decay"]:
            gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
        torch._foreach_mul_(moments, beta1)  # line 13
        torch._foreach_add_(moments, gradients, alpha=1.0 - beta1)
        torch._foreach_mul_(squares, beta2)  # line 14
        torch._foreach_addcmul_(squares, gradients, gradients, value=1.0 - beta2)
        torch._foreach_maximum_(largest, squares)  # line 15
        root = torch._foreach_add(largest, group["eps"])  # line 16
        torch._foreach_sqrt_(root)
        torch._foreach_addcdiv_(weights, moments, root, value=-lr)
        if weights is not parameters:
            torch._foreach_copy_(parameters, weights)


def _state_dtype(parameter: torch.Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _group_by_kind(parameters: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Parameters by device and dtype: a foreach call takes one kind."""
    kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return list(kinds.values())

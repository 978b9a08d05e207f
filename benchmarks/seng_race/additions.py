"""What other second-order methods add to their directions, added to SENG by its public calls.

None of it is a setting of ``hvd.SENG``: ``python -m benchmarks.seng_race --additions`` is where each has to
show that it helps. All take curvature every 10th batch unless they say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import hvd_ext.torch as hvd
from benchmarks.seng_race.methods import ADAM_RATES, METHODS, SENG_SPACE, Method, Values, nesterov

CLIP = 1e-3  # kfac-pytorch's kl_clip
EVERY, FACTOR = 5, 0.95  # K-FAC's (2015) adaptation of the damping: 0.95^5 every 5 steps
CHANGE, LONGEST = 0.1, 200  # relative change of the loss that asks for new curvature; steps at most without
SMOOTH = 0.9  # of the running mean of the loss
Again = Callable[[], torch.Tensor]


class Smoothed:
    """A running mean of the batches' losses."""

    def __init__(self) -> None:
        self.sum = self.weight = 0.0

    def update(self, loss: float) -> float:
        """The mean with one more loss."""
        self.sum = SMOOTH * self.sum + loss
        self.weight = SMOOTH * self.weight + 1.0
        return self.sum / self.weight


def held(model: nn.Module) -> list[nn.Parameter]:
    """Parameters with a gradient."""
    return [p for p in model.parameters() if p.grad is not None]


def then_adamw(model: nn.Module, values: Values, fixed: dict[str, Any]) -> Any:
    """AdamW takes SENG's directions for gradients."""
    seng = hvd.SENG(model, damping=values["damping"], **fixed)
    return ([torch.optim.AdamW(model.parameters(), values["lr"], betas=(0.9, 0.99))],
            lambda loss, again: seng.step())


def clipped(model: nn.Module, values: Values, fixed: dict[str, Any]) -> Any:
    """p is shortened by the root of ``CLIP / (lr^2 g^T p)`` where that is below 1."""
    seng = hvd.SENG(model, damping=values["damping"], **fixed)
    optimizer = nesterov(model, values["rate"] * values["damping"])

    def precondition(loss: float, again: Again) -> None:
        gradients = [p.grad.clone() for p in held(model)]
        seng.step()
        change = optimizer.param_groups[0]["lr"] ** 2 * float(
            sum((g * p.grad).sum() for g, p in zip(gradients, held(model), strict=True)))
        if change > CLIP:
            for p in held(model):
                p.grad.mul_(math.sqrt(CLIP / change))

    return [optimizer], precondition


def adaptive(model: nn.Module, values: Values, fixed: dict[str, Any]) -> Any:
    """Levenberg and Marquardt: less damping while the quadratic model foresees the loss, else more."""
    lam = values["damping"]
    seng = hvd.SENG(model, damping=lambda step: lam, **fixed)
    optimizer = nesterov(model, values["rate"] * lam)
    number = 0

    @torch.no_grad()
    def foreseen(gradients: list[torch.Tensor], loss: float, again: Again) -> float:
        """The loss's change by this direction alone, over what g^T d + d^T U U^T d / 2 says."""
        lr = optimizer.param_groups[0]["lr"]
        slope = squares = 0.0
        for g, p in zip(gradients, held(model), strict=True):
            slope += float((g * p.grad).sum())
            squares += float(p.grad.square().sum())
            p.add_(p.grad, alpha=-lr)
        model_says = -lr * slope + 0.5 * lr * lr * (slope - lam * squares)
        changed = float(again()) - loss
        for p in held(model):
            p.add_(p.grad, alpha=lr)
        return changed / model_says if model_says < 0 else 0.0

    def precondition(loss: float, again: Again) -> None:
        nonlocal lam, number
        number += 1
        gradients = [p.grad.clone() for p in held(model)] if number % EVERY == 0 else []
        seng.step()
        if gradients:
            ratio = foreseen(gradients, loss, again)
            if ratio > 0.75:
                lam *= FACTOR ** EVERY
            elif not ratio >= 0.25:
                lam /= FACTOR ** EVERY

    return [optimizer], precondition


def by_loss(model: nn.Module, values: Values, fixed: dict[str, Any]) -> Any:
    """``(U U^T / s + lam I)^-1 g`` with s the loss over its first value.

    Samples' gradients shrink with their residuals, and with them U, while the damping stays.
    """
    scale = 1.0
    seng = hvd.SENG(model, damping=lambda step: values["damping"] * scale, **fixed)
    mean, first = Smoothed(), 0.0

    def precondition(loss: float, again: Again) -> None:
        nonlocal scale, first
        first = first or loss
        scale = mean.update(loss) / first
        seng.step()
        for p in held(model):
            p.grad.mul_(scale)

    return [nesterov(model, values["rate"] * values["damping"])], precondition


def when_changed(model: nn.Module, values: Values, fixed: dict[str, Any]) -> Any:
    """New curvature when the loss has changed, instead of every so many steps."""
    seng = hvd.SENG(model, damping=values["damping"], **fixed)
    mean, at_refresh = Smoothed(), 0.0

    def precondition(loss: float, again: Again) -> None:
        nonlocal at_refresh
        now = mean.update(loss)
        at_refresh = at_refresh or now
        seng.step()
        if abs(now / at_refresh - 1.0) > CHANGE:
            at_refresh = now
            seng.refresh_next()

    return [nesterov(model, values["rate"] * values["damping"])], precondition


TEN = METHODS["SENG, every 10"].fixed
LONGER = {**SENG_SPACE, "rate": (1e-2, 30.0)}
ADDITIONS = {
    "SENG, every 10": METHODS["SENG, every 10"],
    "then AdamW": Method("AdamW after SENG", then_adamw,
                         {"lr": ADAM_RATES, "damping": SENG_SPACE["damping"]}, TEN),
    "clipped": Method("lr² gᵀp at most 0.001", clipped, LONGER, TEN),
    "Levenberg-Marquardt": Method("damping by the loss's change", adaptive, SENG_SPACE, TEN),
    "units of the loss": Method("curvature over the loss", by_loss, SENG_SPACE, TEN),
    "refresh on change": Method("new curvature when the loss has changed by a tenth", when_changed,
                                SENG_SPACE, {"update_freq": LONGEST, "stale_curvature": "rescale"}),
}

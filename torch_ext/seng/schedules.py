"""The SENG paper's learning rates as ``LambdaLR`` schedules; call ``step()`` after every update."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from hvd_ext import checks
from hvd_ext.seng import Cosine, ExpDecay, Recipe, WarmUp


def _per_step(factor: Callable[[float], float], steps_per_epoch: int) -> Callable[[int], float]:
    """A factor of the epoch as a function of the step.

    A partial function can be pickled, and LambdaLR saves nothing of it: the ``state_dict()`` is plain
    numbers, which ``torch.load(weights_only=True)`` takes.
    """
    return functools.partial(_at_step, factor, checks.check_int("steps_per_epoch", steps_per_epoch, low=1))


def _at_step(factor: Callable[[float], float], steps_per_epoch: int, step: int) -> float:
    return factor(step / steps_per_epoch)


def exp_lr(optimizer: torch.optim.Optimizer, *, max_epoch: float, decay: float = 6.0,
           steps_per_epoch: int, warmup_epochs: float = 0.0, warmup_start: float = 0.0
           ) -> LambdaLR:
    """Set the rate to ``lr (1 - epoch/max_epoch)^decay``, after a linear warm-up.

    Args:
        optimizer: its learning rate is lr.
        max_epoch: the epoch at which the rate is 0.
        decay: the exponent.
        steps_per_epoch: updates in an epoch.
        warmup_epochs: length of the warm-up in epochs.
        warmup_start: the warm-up's first learning rate as a fraction of the optimizer's.

    Source:
        SENG, appendix A, "exp".
    """
    factor = WarmUp(ExpDecay(max_epoch, decay), epochs=warmup_epochs, start=warmup_start)
    return LambdaLR(optimizer, _per_step(factor, steps_per_epoch))


def cosine_lr(optimizer: torch.optim.Optimizer, *, max_epoch: float, steps_per_epoch: int,
              warmup_epochs: float = 0.0, warmup_start: float = 0.0) -> LambdaLR:
    """Set the rate to ``0.001 + (lr - 0.001)(1 + cos(pi epoch/max_epoch))/2``.

    Args:
        optimizer: its learning rate is lr.
        max_epoch: the epoch at which the rate is 0.001.
        steps_per_epoch: updates in an epoch.
        warmup_epochs: length of the warm-up in epochs.
        warmup_start: the warm-up's first learning rate as a fraction of the optimizer's.

    Source:
        SENG, appendix A, "cosine".
    """
    def factor(group: dict[str, float]) -> Callable[[int], float]:
        lr = group.get("initial_lr", group["lr"])
        warm = WarmUp(Cosine(max_epoch, float(lr)), epochs=warmup_epochs, start=warmup_start)
        return _per_step(warm, steps_per_epoch)

    return LambdaLR(optimizer, [factor(group) for group in optimizer.param_groups])


def recipe_lr(optimizer: torch.optim.Optimizer, recipe: Recipe, *, steps_per_epoch: int
              ) -> LambdaLR:
    """Set the rates of a row of SENG's Table 7.

    Args:
        optimizer: its learning rate should be ``recipe.lr``.
        recipe: of ``hvd_ext.seng.imagenet_recipe``.
        steps_per_epoch: updates in an epoch.

    Source:
        SENG, Table 7.
    """
    return LambdaLR(optimizer, _per_step(recipe.lr_factor(), steps_per_epoch))

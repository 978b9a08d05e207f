"""Learning rates and dampings of the SENG paper (appendix A, Table 7) as plain functions.

Learning rates are factors of the initial one, functions of the epoch (a real number).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hvd_ext import checks


@dataclass(frozen=True)
class ExpDecay:
    """``(1 - epoch/max_epoch)^decay`` ("exp" in the paper's appendix A), 0 from max_epoch on."""

    max_epoch: float
    decay: float = 6.0

    def __post_init__(self) -> None:
        checks.check_float("max_epoch", self.max_epoch, low=0.0, open_low=True)
        checks.check_float("decay", self.decay, low=0.0)

    def __call__(self, epoch: float) -> float:
        return float(max(0.0, 1.0 - epoch / self.max_epoch) ** self.decay)


@dataclass(frozen=True)
class Cosine:
    """``(0.001 + (lr - 0.001)(1 + cos(pi epoch/max_epoch))/2) / lr`` ("cosine", appendix A)."""

    max_epoch: float
    lr: float
    floor: float = 0.001

    def __post_init__(self) -> None:
        checks.check_float("max_epoch", self.max_epoch, low=0.0, open_low=True)
        checks.check_float("lr", self.lr, low=0.0, open_low=True)
        checks.check_float("floor", self.floor, low=0.0)

    def __call__(self, epoch: float) -> float:
        part = min(max(epoch / self.max_epoch, 0.0), 1.0)
        lr = self.floor + 0.5 * (self.lr - self.floor) * (1.0 + math.cos(math.pi * part))
        return lr / self.lr


@dataclass(frozen=True)
class WarmUp:
    """Linear from ``start`` to 1 during the first ``epochs``, then ``after(epoch)``."""

    after: ExpDecay | Cosine
    epochs: float = 5.0
    start: float = 0.0

    def __post_init__(self) -> None:
        checks.check_float("epochs", self.epochs, low=0.0, hint="0 for no warm-up")
        checks.check_float("start", self.start, low=0.0, hint="a fraction of the initial learning rate")

    def __call__(self, epoch: float) -> float:
        if epoch < self.epochs:
            return self.start + (1.0 - self.start) * epoch / self.epochs
        return self.after(epoch)


@dataclass(frozen=True)
class DampingDecay:
    """``initial * factor^(epoch/every)`` as a function of the step (Table 7).

    ``stepwise`` holds it constant within an epoch: between two refreshes of the curvature the
    small systems are factored again whenever the damping changes.
    """

    initial: float
    steps_per_epoch: int
    factor: float = 0.9
    every: float = 10.0
    stepwise: bool = True

    def __post_init__(self) -> None:
        checks.check_float("initial", self.initial, low=0.0, open_low=True)
        checks.check_int("steps_per_epoch", self.steps_per_epoch, low=1)
        checks.check_float("factor", self.factor, low=0.0, high=1.0, open_low=True)
        checks.check_float("every", self.every, low=0.0, open_low=True)

    def __call__(self, step: int) -> float:
        epoch = step // self.steps_per_epoch if self.stepwise else step / self.steps_per_epoch
        return float(self.initial * self.factor ** (epoch / self.every))


@dataclass(frozen=True)
class Recipe:
    """Settings for ResNet-50 on ImageNet-1k at one global batch size (section 6.2, Table 7)."""

    batch_size: int
    warmup_lr: float
    lr: float
    decay: float
    max_epoch: float
    damping: float
    damping_factor: float = 1.0
    damping_every: float = 10.0
    warmup_epochs: float = 5.0

    def lr_factor(self) -> WarmUp:
        """The learning rate's factor as a function of the epoch."""
        return WarmUp(ExpDecay(self.max_epoch, self.decay), epochs=self.warmup_epochs,
                      start=self.warmup_lr / self.lr)

    def damping_at_step(self, steps_per_epoch: int) -> float | DampingDecay:
        """The damping: a number, or a function of the step where it decays."""
        if self.damping_factor == 1.0:
            return self.damping
        return DampingDecay(self.damping, steps_per_epoch, self.damping_factor, self.damping_every)


IMAGENET_RECIPES = {
    256: Recipe(256, warmup_lr=0.01, lr=0.145, decay=6.0, max_epoch=60.0, damping=0.17),
    512: Recipe(512, 0.01, 0.3, 6.0, 60.0, 0.17, 0.9),
    1024: Recipe(1024, 0.01, 0.6, 6.0, 60.0, 0.17, 0.9),
    2048: Recipe(2048, 0.2, 1.2, 6.0, 60.0, 0.3, 0.7),
    4096: Recipe(4096, 0.2, 2.2, 5.0, 55.0, 0.3, 0.7),
}
"""By global batch size. For 256 the paper gives lr, damping and the 5 warm-up epochs only; start
of the warm-up, decay and length are those of the next row."""


def imagenet_recipe(batch_size: int) -> Recipe:
    """The recipe of the smallest listed batch size that is not below ``batch_size``."""
    checks.check_int("batch_size", batch_size, low=1)
    return IMAGENET_RECIPES[min((size for size in IMAGENET_RECIPES if size >= batch_size),
                                default=max(IMAGENET_RECIPES))]

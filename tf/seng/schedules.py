"""The SENG paper's learning rates as Keras schedules: pass one as an optimizer's ``learning_rate``."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from hvd_ext import checks
from hvd_ext.seng import Recipe

FLOOR = 0.001  # of the cosine


@keras.saving.register_keras_serializable(package="hvd_ext")
class PaperSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A decay over epochs after a linear warm-up (SENG appendix A).

    Args:
        initial_learning_rate: the learning rate after the warm-up.
        kind: "exp", ``lr (1 - epoch/max_epoch)^decay``, or "cosine",
            ``0.001 + (lr - 0.001)(1 + cos(pi epoch/max_epoch))/2``.
        max_epoch: when the decay ends.
        steps_per_epoch: steps per epoch, at least 1.
        decay: the exponent of "exp".
        warmup_epochs: length of the warm-up; 0 for none.
        warmup_start: its first learning rate as a fraction of ``initial_learning_rate``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its limits.
    """

    def __init__(self, initial_learning_rate: float, *, kind: str, max_epoch: float,
                 steps_per_epoch: int, decay: float = 6.0, warmup_epochs: float = 0.0,
                 warmup_start: float = 0.0) -> None:
        self.config = {
            "initial_learning_rate": checks.check_float("initial_learning_rate", initial_learning_rate,
                                                        low=0.0, open_low=True),
            "kind": checks.check_choice("kind", kind, ("exp", "cosine")),
            "max_epoch": checks.check_float("max_epoch", max_epoch, low=0.0, open_low=True),
            "steps_per_epoch": checks.check_int("steps_per_epoch", steps_per_epoch, low=1),
            "decay": checks.check_float("decay", decay, low=0.0),
            "warmup_epochs": checks.check_float("warmup_epochs", warmup_epochs, low=0.0),
            "warmup_start": checks.check_float("warmup_start", warmup_start, low=0.0),
        }

    def __call__(self, step: Any) -> tf.Tensor:
        """The learning rate at a step, 0-D float32."""
        config: dict[str, Any] = self.config
        lr, warm_up = config["initial_learning_rate"], config["warmup_epochs"]
        epoch = tf.cast(step, tf.float32) / config["steps_per_epoch"]
        part = tf.clip_by_value(epoch / config["max_epoch"], 0.0, 1.0)
        if config["kind"] == "exp":
            after = lr * (1.0 - part) ** config["decay"]
        else:
            after = FLOOR + 0.5 * (lr - FLOOR) * (1.0 + tf.cos(math.pi * part))
        if not warm_up:
            return after
        start = config["warmup_start"]
        return tf.where(epoch < warm_up, lr * (start + (1.0 - start) * epoch / warm_up), after)

    def get_config(self) -> dict[str, Any]:
        return dict(self.config)


def exp_lr(initial_learning_rate: float, *, max_epoch: float, decay: float = 6.0,
           steps_per_epoch: int, warmup_epochs: float = 0.0, warmup_start: float = 0.0
           ) -> PaperSchedule:
    """Make the schedule ``lr (1 - epoch/max_epoch)^decay``, after a linear warm-up.

    Args:
        initial_learning_rate: lr.
        max_epoch: the epoch at which the rate is 0.
        decay: the exponent.
        steps_per_epoch: updates in an epoch.
        warmup_epochs: length of the warm-up in epochs.
        warmup_start: the warm-up's first learning rate as a fraction of ``initial_learning_rate``.

    Source:
        SENG, appendix A, "exp".
    """
    return PaperSchedule(initial_learning_rate, kind="exp", max_epoch=max_epoch, decay=decay,
                         steps_per_epoch=steps_per_epoch, warmup_epochs=warmup_epochs,
                         warmup_start=warmup_start)


def cosine_lr(initial_learning_rate: float, *, max_epoch: float, steps_per_epoch: int,
              warmup_epochs: float = 0.0, warmup_start: float = 0.0) -> PaperSchedule:
    """Make the schedule ``0.001 + (lr - 0.001)(1 + cos(pi epoch/max_epoch))/2``.

    Args:
        initial_learning_rate: lr.
        max_epoch: the epoch at which the rate is 0.001.
        steps_per_epoch: updates in an epoch.
        warmup_epochs: length of the warm-up in epochs.
        warmup_start: the warm-up's first learning rate as a fraction of ``initial_learning_rate``.

    Source:
        SENG, appendix A, "cosine".
    """
    return PaperSchedule(initial_learning_rate, kind="cosine", max_epoch=max_epoch,
                         steps_per_epoch=steps_per_epoch, warmup_epochs=warmup_epochs,
                         warmup_start=warmup_start)


def recipe_lr(recipe: Recipe, *, steps_per_epoch: int) -> PaperSchedule:
    """Make the schedule of a row of SENG's Table 7.

    Args:
        recipe: of ``hvd_ext.seng.imagenet_recipe``.
        steps_per_epoch: updates in an epoch.

    Source:
        SENG, Table 7.
    """
    return exp_lr(recipe.lr, max_epoch=recipe.max_epoch, decay=recipe.decay,
                  steps_per_epoch=steps_per_epoch, warmup_epochs=recipe.warmup_epochs,
                  warmup_start=recipe.warmup_lr / recipe.lr)

"""Settings of gradients that are exchanged beside the next step's compute and applied one step late."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hvd_ext.reducers.delay_compensation.config import check_rule
from hvd_ext.state import OWN, Part

STATE = (Part("late", label="the delayed gradient", layout=OWN, attribute="own"),)


@dataclass(frozen=True)
class DelayedUpdate:
    """Apply every gradient one step late, so that its exchange runs beside the next step's compute.

    Pass it as ``overlap=``. What step t reduces, ``g = mean_i g^i(w_t)``, is applied at step t+1, to weights
    that have moved on to ``w_{t+1}`` meanwhile. It is compensated for that by the first term of a Taylor
    series (DC-ASGD eq. 10; used one step late by DC-S3GD, arXiv 1911.02516):
    ``g + lam g*g*(w_{t+1} - w_t)``. Every rank knows both weights: nothing more is sent.

    Args:
        lam: strength of the compensation, >= 0; 0 applies the late gradient as it is. With ``adaptive``
            it is lam0 of the rule below, otherwise the constant itself.
        adaptive: divide ``lam`` elementwise by ``sqrt(MeanSquare + eps)`` with
            ``MeanSquare <- decay MeanSquare + (1 - decay) g*g``, which is kept in full on every rank.
        decay: memory of MeanSquare, in [0, 1).
        eps: added to MeanSquare under the root, > 0.

    Raises:
        TypeError, ValueError: a setting is of the wrong type or outside its limits.
    """

    lam: float = 2.0
    adaptive: bool = field(default=True, kw_only=True)
    decay: float = field(default=0.95, kw_only=True)
    eps: float = field(default=1e-7, kw_only=True)

    def __post_init__(self) -> None:
        check_rule(self.lam, self.adaptive, self.decay, self.eps)

    @property
    def keeps_mean_square(self) -> bool:
        """Whether the rule keeps MeanSquare between steps."""
        return self.adaptive and self.lam > 0


def check_overlap(overlap: Any, *, preconditioner: Any, passes_apart: bool,
                  multiple_evaluations: bool) -> None:
    """Refuse a ``overlap=`` argument, or what cannot go with it.

    Args:
        overlap: the argument; None is fine.
        preconditioner: the ``preconditioner=`` argument.
        passes_apart: each backward pass is a worker of its own.
        multiple_evaluations: the wrapped optimizer evaluates a closure several times per step.

    Raises:
        TypeError: it is no ``DelayedUpdate``.
        ValueError: what cannot be combined.
    """
    if overlap is None:
        return
    if not isinstance(overlap, DelayedUpdate):
        raise TypeError(f"overlap must be hvd.DelayedUpdate(...) or None, got {overlap!r}")
    if preconditioner is not None:
        raise ValueError(
            "overlap= and preconditioner= cannot be combined: SENG's curvature is of the step whose "
            "activations it has just seen, and the gradient would be of the one before; drop one of them")
    if passes_apart:
        raise ValueError('overlap= and virtual_workers="microbatch" cannot be combined: micro-batches would '
                         'overwrite those that are still on their way; use virtual_workers="rank"')
    if multiple_evaluations:
        raise ValueError("overlap= cannot be combined with an optimizer that evaluates its closure several "
                         "times per step (LBFGS); use SGD or Adam")

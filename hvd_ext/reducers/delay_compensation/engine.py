"""Asynchronous SGD in one process: any delays, replayed exactly, for any gradient function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_ext import checks
from hvd_ext.reducers.delay_compensation.momentum import AutoMomentum
from hvd_ext.reducers.delay_compensation.sequences import Constant, DelaySequence
from hvd_ext.reducers.delay_compensation.update_rules import Array, AsyncRule, apply_update

Gradient = Callable[[Array, int], Array]
Setting = float | Array | Callable[[int], Any]


@dataclass(frozen=True)
class Trajectory:
    """What :func:`replay` returns.

    Attributes:
        weights: w after the last update, of the start's shape.
        delays: tau_k of every update, (steps,) or (steps, R).
        observed: what ``observe`` returned, in order.
        observed_at: after how many updates it was called.
    """

    weights: Array
    delays: NDArray[np.int64]
    observed: list[Any]
    observed_at: list[int]


def replay(gradient: Gradient, start: Array, *, steps: int,
           delays: DelaySequence | Sequence[DelaySequence] | int = 0, lr: Setting,
           momentum: Setting | AutoMomentum = 0.0, rule: AsyncRule | None = None,
           observe: Callable[[Array, int], Any] | None = None, observe_every: int = 1) -> Trajectory:
    """Applies ``steps`` delayed gradients, each taken at the weights tau_k updates ago.

    ``w_(k+1) = w_k - lr * h(g(w_(k - tau_k))) + momentum * (w_k - w_(k-1))`` (Async-MSGD eq. 1.3),
    with h the rule (DC-ASGD eq. 10 and Algorithm 2). Nothing is random but what ``gradient`` and
    the delays make so; the same call gives the same bits.

    Args:
        gradient: called as ``gradient(w_old, k)``; returns an array of w's shape and must not
            change ``w_old``. With R independent repetitions in the first axis it is called once
            for all of them.
        start: w_0, float32 or float64, any shape; (R, ...) with independent repetitions.
        steps: how many updates.
        delays: a delay sequence; a number for a constant one; or one sequence a repetition.
        lr, momentum: a number, an array that broadcasts against w (one value a repetition, say),
            or a function of the update k that returns either. ``AutoMomentum`` follows the delays.
        rule: by default ASGD. MeanSquare is kept per worker when the sequence tells workers apart.
        observe: called as ``observe(w, k)`` before the first update and after every
            ``observe_every`` updates, k the number of updates so far.
        observe_every: at least 1.

    Raises:
        ValueError: an argument is out of range or the gradient has another shape.
        TypeError: ``start`` is neither float32 nor float64.
    """
    steps = checks.check_int("steps", steps, low=0)
    every = checks.check_int("observe_every", observe_every, low=1)
    rule = AsyncRule(name="asgd") if rule is None else rule
    w = np.array(start)
    if w.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"start must be float32 or float64, got {w.dtype}")
    taus, senders = _plan_updates(delays, steps, w.shape)
    if isinstance(momentum, AutoMomentum) and taus.ndim > 1:
        raise ValueError("AutoMomentum needs one delay sequence for all repetitions")
    history = np.broadcast_to(w, (int(taus.max(initial=0)) + 1, *w.shape)).copy()
    if isinstance(momentum, AutoMomentum):
        momentum = momentum.fresh_copy()
    moves = not (isinstance(momentum, (int, float)) and momentum == 0)
    velocity = np.zeros_like(w) if moves else None
    mean_squares: dict[int, Array] = {}
    work = np.empty_like(w), np.empty_like(w)
    repetitions = np.arange(w.shape[0]) if taus.ndim > 1 else None
    observed: list[Any] = []
    observed_at: list[int] = []
    if observe is not None:
        observed, observed_at = [observe(w, 0)], [0]
    with np.errstate(over="ignore", invalid="ignore"):  # a run that diverges is a result
        for k in range(steps):
            slots = (k - taus[k]) % len(history)
            old = history[slots] if repetitions is None else history[slots, repetitions]
            g = gradient(old, k)
            if np.shape(g) != w.shape:
                raise ValueError(f"gradient must return shape {w.shape}, got {np.shape(g)}")
            mean_square = None
            if rule.adaptive:
                mean_square = mean_squares.setdefault(int(senders[k]), np.zeros_like(w))
            apply_update(rule, w, g, lr=_value_at(lr, k), momentum=_momentum_at(momentum, k, taus),
                         w_bak=old, mean_square=mean_square, velocity=velocity, work=work)
            history[(k + 1) % len(history)] = w
            if observe is not None and (k + 1) % every == 0:
                observed.append(observe(w, k + 1))
                observed_at.append(k + 1)
    return Trajectory(w, taus, observed, observed_at)


def _plan_updates(delays: DelaySequence | Sequence[DelaySequence] | int, steps: int,
                  shape: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The delays, (steps,) or (steps, R), and the sender of each update (steps,)."""
    if isinstance(delays, int):
        delays = Constant(delays)
    if not isinstance(delays, Sequence):
        return delays.take(steps), delays.workers(steps)
    if not shape or len(delays) != shape[0]:
        raise ValueError(
            f"one delay sequence a repetition needs {shape[0] if shape else 0} of them, "
            f"got {len(delays)}"
        )
    taken = np.empty((steps, len(delays)), dtype=np.int64)
    columns: dict[int, NDArray[np.int64]] = {}
    for r, sequence in enumerate(delays):  # the same sequence given often is drawn once
        if id(sequence) not in columns:
            columns[id(sequence)] = sequence.take(steps)
        taken[:, r] = columns[id(sequence)]
    return taken, np.zeros(steps, dtype=np.int64)


def _value_at(setting: Setting, k: int) -> Any:
    """The setting at update k; a scalar as a plain float, which leaves float32 weights float32."""
    value = setting(k) if callable(setting) else setting
    return float(value) if np.ndim(value) == 0 else value


def _momentum_at(setting: Setting | AutoMomentum, k: int, taus: NDArray[np.int64]) -> Any:
    return setting.next_momentum(int(taus[k])) if isinstance(setting, AutoMomentum) else _value_at(setting, k)

"""ServerSettings of the parameter server, checked on construction."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from hvd_ext import checks
from hvd_ext.reducers.delay_compensation.momentum import AutoMomentum
from hvd_ext.reducers.delay_compensation.update_rules import AsyncRule

Schedule = float | Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Everything a run is configured with, the same on every rank.

    Args:
        rule: how a delayed gradient is corrected.
        lr: a number above 0, or a function of the number of updates so far; with
            ``updates_per_epoch`` a function of the epoch (a float, updates / updates_per_epoch).
        updates_per_epoch: how many updates make an epoch, for ``lr`` as a function of it.
        momentum: mu of Async-MSGD eq. 1.3 in [0, 1); "auto" or an ``AutoMomentum`` holds it under
            the bound from the measured delay.
        prefetch: let a worker start on its next mini-batch while its last push still travels;
            each of its gradients is then one more of its own updates late.
        worker_timeout: seconds a worker may be silent before it is left out; None to wait forever.
        server_timeout: seconds a worker waits for an answer, and servers for each other (rank 0 for
            three quarters of it, so that the workers are told who is missing); None to wait forever.
        start_timeout: seconds within which all ranks must have constructed the server.
        checkpoint_dir: folder for checkpoints; None for none. One that holds checkpoints is taken
            only with ``resume`` from the newest of them.
        checkpoint_every: updates between two of them; None for only at a stop and at the end.
        keep: how many checkpoints are kept.
        resume: a checkpoint, or a folder of them (its newest is taken); None to start afresh.
        reset_workers: when resuming, drop the state kept per worker (w_bak, MeanSquare), as is
            needed with another number of workers or another rule.
        broadcast: start every rank from the primary server's weights instead of checking that
            all ranks have the same ones.
        progress: show progress on the primary server's terminal.
        total_updates: what the progress bar counts to; None if unknown.

    Raises:
        ValueError, TypeError: a setting is of the wrong type or out of range.
    """

    rule: AsyncRule
    lr: Schedule
    updates_per_epoch: int | None = None
    momentum: float | str | AutoMomentum = 0.0
    prefetch: bool = False
    worker_timeout: float | None = 300.0
    server_timeout: float | None = 300.0
    start_timeout: float = 120.0
    checkpoint_dir: Path | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    resume: Path | None = None
    reset_workers: bool = False
    broadcast: bool = False
    progress: bool = field(default=True)
    total_updates: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rule, AsyncRule):
            raise TypeError(f"rule must be an AsyncRule, got {self.rule!r}; pass AsyncRule(name=...)")
        for name in ("checkpoint_dir", "resume"):
            if not isinstance(getattr(self, name), Path | None):
                raise TypeError(f"{name} must be a pathlib.Path or None, got {getattr(self, name)!r}")
        checks.number_or_schedule("lr", self.lr, low=0.0, open_low=True,
                                  hint="pass a number above 0 or a function")
        if self.updates_per_epoch is not None:
            checks.check_int("updates_per_epoch", self.updates_per_epoch, low=1)
            if not callable(self.lr):
                raise ValueError(
                    f"updates_per_epoch={self.updates_per_epoch} needs lr to be a function of the epoch, got "
                    f"lr={self.lr!r}; pass such a function or leave updates_per_epoch out"
                )
        if isinstance(self.momentum, str):
            checks.check_choice("momentum", self.momentum, ["auto"],
                                hint='pass a number in [0, 1) or "auto"')
            object.__setattr__(self, "momentum", AutoMomentum())
        elif not isinstance(self.momentum, AutoMomentum):
            checks.check_float("momentum", self.momentum, low=0.0, high=1.0, open_high=True,
                               hint='pass a number in [0, 1) or "auto"')
        for name in ("prefetch", "reset_workers", "broadcast", "progress"):
            checks.check_bool(name, getattr(self, name))
        for name in ("worker_timeout", "server_timeout"):
            if getattr(self, name) is not None:
                checks.check_float(name, getattr(self, name), low=0.0, open_low=True,
                                   hint="seconds; None waits for ever")
        checks.check_float("start_timeout", self.start_timeout, low=0.0, open_low=True, hint="seconds")
        checks.check_int("keep", self.keep, low=1)
        for name in ("checkpoint_every", "total_updates"):
            if getattr(self, name) is not None:
                checks.check_int(name, getattr(self, name), low=1)
        if self.checkpoint_every is not None and self.checkpoint_dir is None:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every} needs checkpoint_dir; pass a folder"
            )

    @property
    def depth(self) -> int:
        """How many pulled weights of one worker are in use at a time."""
        return 2 if self.prefetch else 1

    @property
    def moves(self) -> bool:
        """Whether a velocity is kept."""
        return isinstance(self.momentum, AutoMomentum) or self.momentum != 0.0

    def lr_at(self, update: int) -> float:
        """The learning rate of an update, counted from 0.

        Raises:
            ValueError: the schedule returned something that is no number at or above 0.
        """
        if not callable(self.lr):
            return float(self.lr)
        epoch = update if self.updates_per_epoch is None else update / self.updates_per_epoch
        return checks.check_float(f"lr at update {update}", self.lr(epoch), low=0.0,
                                  hint="correct the schedule")

    def settings_digest(self) -> str:
        """A short text that is the same on ranks with the same settings."""
        lines = []
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, AutoMomentum):
                value = (value.momentum, value.reference_delay, value.window)
            elif callable(value):
                value = "function"
            if item.name not in ("progress", "total_updates"):
                lines.append(f"{item.name}={value}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

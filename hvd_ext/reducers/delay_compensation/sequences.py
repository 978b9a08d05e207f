"""Delay sequences: which update's weights the k-th gradient was taken at.

A sequence gives, for every update k, its delay tau_k (int, in updates) and the worker that sent
it. ``take`` clips tau_k to k: the oldest weights are the starting ones.
"""

from __future__ import annotations

import heapq
import os
from dataclasses import dataclass, field
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from hvd_ext import checks

Ints = NDArray[np.int64]


class DelaySequence(Protocol):
    """Anything that says the delays of the first ``steps`` updates."""

    def take(self, steps: int) -> Ints:
        """The delays (steps,), int64, ``0 <= delays[k] <= k``."""

    def workers(self, steps: int) -> Ints:
        """The worker that sent each update (steps,), int64 from 0."""


def _clip_delays(delays: Ints) -> Ints:
    return np.minimum(delays, np.arange(len(delays), dtype=np.int64))


class _OneWorker:
    """A sequence that tells no workers apart."""

    def workers(self, steps: int) -> Ints:
        """All from worker 0."""
        return np.zeros(steps, dtype=np.int64)


@dataclass(frozen=True)
class Constant(_OneWorker):
    """The same delay for every update.

    Args:
        delay: tau in updates, at least 0.
    """

    delay: int

    def __post_init__(self) -> None:
        checks.check_int("delay", self.delay, low=0)

    def take(self, steps: int) -> Ints:
        """The delays (steps,)."""
        return _clip_delays(np.full(steps, self.delay, dtype=np.int64))


@dataclass(frozen=True)
class Uniform(_OneWorker):
    """Independent delays, uniform on the whole numbers from ``low`` to ``high``, both included.

    Args:
        low, high: in updates, ``0 <= low <= high``.
        seed: of the generator; the same seed gives the same delays.
    """

    low: int
    high: int
    seed: int = 0

    def __post_init__(self) -> None:
        checks.check_int("low", self.low, low=0)
        checks.check_int("high", self.high, low=self.low, hint="it must not lie under low")

    def take(self, steps: int) -> Ints:
        """The delays (steps,)."""
        rng = np.random.default_rng(self.seed)
        return _clip_delays(rng.integers(self.low, self.high + 1, size=steps, dtype=np.int64))


@dataclass(frozen=True)
class Geometric(_OneWorker):
    """Independent delays 0, 1, 2, ... with P(tau) = p (1 - p)^tau, p = 1 / (1 + mean).

    Args:
        mean: of the delay, in updates, at least 0.
        seed: of the generator.
    """

    mean: float
    seed: int = 0

    def __post_init__(self) -> None:
        checks.check_float("mean", self.mean, low=0.0)

    def take(self, steps: int) -> Ints:
        """The delays (steps,)."""
        rng = np.random.default_rng(self.seed)
        return _clip_delays(rng.geometric(1.0 / (1.0 + self.mean), size=steps).astype(np.int64) - 1)


@dataclass(frozen=True)
class Simulated:
    """The delays of M workers whose computing times vary, without a cluster.

    Every worker pulls, computes for a time drawn from a Gamma distribution and pushes; the server
    takes the pushes in order of time.

    Args:
        count: M, the number of workers.
        spread: standard deviation of a computing time over its mean; 0 is strict turn-taking
            (tau = M - 1 once all have started).
        slow: how many times slower each worker is than the first one (count,); None for equal.
        seed: of the generator.
    """

    count: int
    spread: float = 0.2
    slow: tuple[float, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks.check_int("count", self.count, low=1)
        checks.check_float("spread", self.spread, low=0.0)
        if self.slow is not None and len(self.slow) != self.count:
            raise ValueError(
                f"slow must have one factor a worker ({self.count}), got {len(self.slow)}"
            )

    def _run_simulation(self, steps: int) -> tuple[Ints, Ints]:
        rng = np.random.default_rng(self.seed)
        means = np.ones(self.count) if self.slow is None else np.asarray(self.slow, dtype=float)
        if self.spread > 0:
            shape = self.spread**-2.0
            times = rng.gamma(shape, 1.0 / shape, size=steps + self.count)
        else:
            times = np.ones(steps + self.count)
        clock = [(means[m] * times[m], m) for m in range(self.count)]
        heapq.heapify(clock)
        pulled = np.zeros(self.count, dtype=np.int64)
        delays = np.empty(steps, dtype=np.int64)
        workers = np.empty(steps, dtype=np.int64)
        for k in range(steps):
            now, m = clock[0]
            delays[k], workers[k] = k - pulled[m], m
            pulled[m] = k + 1
            heapq.heapreplace(clock, (now + means[m] * times[self.count + k], m))
        return delays, workers

    def take(self, steps: int) -> Ints:
        """The delays (steps,)."""
        return self._run_simulation(steps)[0]

    def workers(self, steps: int) -> Ints:
        """Who sent each update (steps,)."""
        return self._run_simulation(steps)[1]


@dataclass(frozen=True)
class Recorded:
    """What a parameter server measured, update by update, for an exact replay.

    Args:
        delays: tau_k (steps,).
        senders: the worker of each update (steps,), from 0; by default all 0.
        batches: how many gradients that worker had computed before this one (steps,): which of
            its mini-batches it was.
        lr, momentum: the values each update used (steps,).

    Raises:
        ValueError: the lengths differ, or a delay reaches back before the start.
    """

    delays: Ints
    senders: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    batches: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    lr: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    momentum: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        delays = np.asarray(self.delays, dtype=np.int64)
        wrong = np.flatnonzero((delays < 0) | (delays > np.arange(len(delays))))
        if wrong.size:
            k = int(wrong[0])
            raise ValueError(f"delay of update {k} must be in [0, {k}], got {delays[k]}")
        object.__setattr__(self, "delays", delays)
        for name in ("senders", "batches", "lr", "momentum"):
            values = np.asarray(getattr(self, name))
            if len(values) not in (0, len(delays)):
                raise ValueError(f"{name} must have {len(delays)} entries, got {len(values)}")
            object.__setattr__(self, name, values)

    def __len__(self) -> int:
        return len(self.delays)

    def _check_length(self, steps: int) -> None:
        if steps > len(self.delays):
            raise ValueError(
                f"steps must be at most the {len(self.delays)} recorded updates, got {steps}"
            )

    def take(self, steps: int) -> Ints:
        """The delays (steps,)."""
        self._check_length(steps)
        return self.delays[:steps]

    def workers(self, steps: int) -> Ints:
        """Who sent each update (steps,)."""
        self._check_length(steps)
        return self.senders[:steps] if len(self.senders) else np.zeros(steps, dtype=np.int64)

    def save(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """Writes the recording as an ``.npz`` file."""
        np.savez(path, delays=self.delays, senders=self.senders, batches=self.batches,
                 lr=self.lr, momentum=self.momentum)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recorded:
        """Reads what :meth:`save` wrote."""
        with np.load(path) as file:
            return cls(**{name: file[name] for name in file.files})

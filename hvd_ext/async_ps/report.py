"""What a run measured: delays, throughput, bytes, faults."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

DEAD = "its process ended"  # why a worker was left out
MAX_DELAY_BINS = 4096  # delays from here on share the histogram's last entry


@dataclass
class Delays:
    """Mean, maximum and histogram of delays, in updates; entry t of the histogram: tau = t."""

    count: int = 0
    total: int = 0
    maximum: int = 0
    histogram: list[int] = field(default_factory=list)

    def add_delay(self, delay: int) -> None:
        """Takes note of one delay."""
        self.count += 1
        self.total += delay
        self.maximum = max(self.maximum, delay)
        place = min(delay, MAX_DELAY_BINS)
        if place >= len(self.histogram):
            self.histogram.extend([0] * (place + 1 - len(self.histogram)))
        self.histogram[place] += 1

    @property
    def mean(self) -> float:
        """The mean delay; 0 before the first."""
        return self.total / self.count if self.count else 0.0


@dataclass
class WorkerReport:
    """One worker: its updates, delays (updates), gradients dropped because they were not finite,
    bytes to and from the servers, and why it was left out, if it was."""

    worker: int
    rank: int
    updates: int = 0
    not_finite: int = 0
    bytes_pushed: int = 0
    bytes_pulled: int = 0
    left_out: str | None = None
    finished: bool = False
    delay: Delays = field(default_factory=Delays)


@dataclass
class Report:
    """A whole run, as the primary server saw it.

    ``seconds`` counts serving time since this start (not before a resume), ``updates`` all updates
    since the weights' beginning, ``updates_per_second`` those of this start.
    """

    updates: int
    not_finite: int
    seconds: float
    updates_per_second: float
    bytes_pushed: int
    bytes_pulled: int
    lr: float
    momentum: float
    delay: Delays
    workers: list[WorkerReport]

    def to_json(self) -> str:
        """As text, for files and for the workers."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads what :meth:`to_json` wrote."""
        data: dict[str, Any] = json.loads(text)
        return cls(**{**data, "delay": Delays(**data["delay"]),
                      "workers": [worker_from(entry) for entry in data["workers"]]})


def worker_from(entry: dict[str, Any]) -> WorkerReport:
    """A worker's report from its JSON form."""
    return WorkerReport(**{**entry, "delay": Delays(**entry["delay"])})

"""Puts all updates in one order and keeps their books; pure decisions, no communication."""

from __future__ import annotations

import time
from array import array
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hvd_ext.async_ps.config import ServerSettings
from hvd_ext.async_ps.plan import Plan
from hvd_ext.async_ps.report import Delays, Report, WorkerReport, worker_from
from hvd_ext.reducers.delay_compensation.momentum import AutoMomentum
from hvd_ext.reducers.delay_compensation.sequences import Recorded


@dataclass(frozen=True)
class Commit:
    """One update: number ``update`` from 0, by ``worker``, on its pulled weights ``slot``."""

    update: int
    worker: int
    slot: int
    delay: int
    lr: float
    momentum: float


class Sequencer:
    """The primary server's books: which update comes next, at which lr and momentum, how late.

    A worker's p-th push was computed at the weights in its slot ``p % depth``; the answer to it
    goes into the same slot.
    """

    def __init__(self, settings: ServerSettings, plan: Plan, itemsize: int) -> None:
        self.settings = settings
        self.plan = plan
        self.itemsize = itemsize
        self.update = 0
        self.counts = [0] * plan.workers
        self.versions = [[0] * settings.depth for _ in range(plan.workers)]
        self.workers = [WorkerReport(m, plan.rank(m)) for m in range(plan.workers)]
        self.delay = Delays()
        momentum = settings.momentum
        self.auto = momentum.fresh_copy() if isinstance(momentum, AutoMomentum) else None
        self.momentum = 0.0 if self.auto is not None else float(momentum)  # type: ignore[arg-type]
        self.lr = settings.lr_at(0)
        self._record: dict[str, array[Any]] = {
            "delays": array("q"), "senders": array("q"), "batches": array("q"),
            "lr": array("d"), "momentum": array("d"),
        }
        self._began = time.perf_counter()
        self._first = 0

    def commit_push(self, worker: int) -> Commit:
        """The next update, from this worker's next push."""
        slot = self.counts[worker] % self.settings.depth
        delay = self.update - self.versions[worker][slot]
        self.lr = self.settings.lr_at(self.update)
        if self.auto is not None:
            self.momentum = self.auto.next_momentum(delay)
        made = Commit(self.update, worker, slot, delay, self.lr, self.momentum)
        for name, value in (("delays", delay), ("senders", worker),
                            ("batches", self.counts[worker]), ("lr", self.lr),
                            ("momentum", self.momentum)):
            self._record[name].append(value)
        self.delay.add_delay(delay)
        record = self.workers[worker]
        record.delay.add_delay(delay)
        record.updates += 1
        record.bytes_pushed += self.plan.numel * self.itemsize
        self.update += 1
        self._record_answer(worker, slot)
        return made

    def drop_push(self, worker: int) -> int:
        """A push with a gradient that is not finite: counted, not applied; the slot it frees."""
        slot = self.counts[worker] % self.settings.depth
        self.workers[worker].not_finite += 1
        self._record_answer(worker, slot)
        return slot

    def _record_answer(self, worker: int, slot: int) -> None:
        self.versions[worker][slot] = self.update
        self.counts[worker] += 1
        self.workers[worker].bytes_pulled += self.plan.numel * self.itemsize

    @property
    def recording(self) -> Recorded:
        """Every update's delay, worker, mini-batch, lr and momentum, for an exact replay."""
        return Recorded(**{name: np.array(values) for name, values in self._record.items()})

    def report(self) -> Report:
        """The books so far."""
        seconds = time.perf_counter() - self._began
        return Report(
            updates=self.update, not_finite=sum(w.not_finite for w in self.workers),
            seconds=seconds, updates_per_second=(self.update - self._first) / max(seconds, 1e-9),
            bytes_pushed=sum(w.bytes_pushed for w in self.workers),
            bytes_pulled=sum(w.bytes_pulled for w in self.workers),
            lr=self.lr, momentum=self.momentum, delay=self.delay, workers=self.workers,
        )

    def start_clock(self) -> None:
        """Serving begins."""
        self._began = time.perf_counter()
        self._first = self.update

    def state_dict(self) -> dict[str, Any]:
        """The books as plain numbers, texts and lists; the recording is saved apart."""
        return {
            "update": self.update, "counts": list(self.counts),
            "versions": [list(slots) for slots in self.versions],
            "workers": [asdict(worker) for worker in self.workers], "delay": asdict(self.delay),
            "auto": None if self.auto is None else self.auto.state_dict(),
            "momentum": self.momentum, "lr": self.lr,
        }

    def load_state_dict(self, state: dict[str, Any], recording: Recorded, *,
                        reset_workers: bool) -> None:
        """Takes the books over; with ``reset_workers`` all workers start at the current weights.

        Workers that had been left out or had finished take part again.
        """
        self.update = int(state["update"])
        self.delay = Delays(**state["delay"])
        for name in self._record:
            self._record[name] = array(self._record[name].typecode,
                                       getattr(recording, name).tolist())
        if self.auto is not None and state["auto"] is not None:
            self.auto.load_state_dict(state["auto"])
        self.momentum, self.lr = float(state["momentum"]), float(state["lr"])
        if reset_workers:
            self.versions = [[self.update] * self.settings.depth for _ in self.versions]
            return
        self.counts = [int(count) for count in state["counts"]]
        self.versions = [[int(version) for version in slots] for slots in state["versions"]]
        self.workers = [worker_from({**entry, "left_out": None, "finished": False})
                        for entry in state["workers"]]

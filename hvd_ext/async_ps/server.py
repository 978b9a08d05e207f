"""What every server does with its slice, whoever puts the updates in order."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType

import numpy as np
from mpi4py import MPI

from hvd_ext.async_ps import wire
from hvd_ext.async_ps.checkpoint import save_shard
from hvd_ext.async_ps.config import ServerSettings
from hvd_ext.async_ps.errors import ServerLost
from hvd_ext.async_ps.model import Array
from hvd_ext.async_ps.plan import Plan
from hvd_ext.async_ps.registration import Membership
from hvd_ext.async_ps.sequencer import Commit
from hvd_ext.async_ps.shard import Shard
from hvd_ext.async_ps.transport import HeaderBox, Inbox, Outbox
from hvd_ext.checkpoints import Mark, place

LOOK_EVERY = 0.02  # seconds between looks at the watch, the clock and the terminal
FLUSH_SECONDS = 30.0


class Patience:
    """How long nothing may happen; ``limit`` None is for ever."""

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.reset()

    def reset(self) -> None:
        """Something happened."""
        self.began = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether nothing has happened for too long."""
        return self.limit is not None and time.monotonic() - self.began > self.limit


def ranks_text(ranks: Iterable[int]) -> str:
    """Server ranks for a message."""
    numbers = sorted(ranks)
    return ("server rank " if len(numbers) == 1 else "server ranks ") + ", ".join(map(str, numbers))


class Server:
    """One server rank: its shard and its traffic with the workers.

    Args:
        plan: the roles.
        member: what registration returned.
        settings: the run's settings.
        weights: the model's starting weights, flat (numel,).
    """

    def __init__(self, plan: Plan, member: Membership, settings: ServerSettings, weights: Array) -> None:
        self.plan = plan
        self.member = member
        self.settings = settings
        self.comm = member.comm
        self.rank = self.comm.rank
        own = plan.slices[self.rank]
        self.shard = Shard(weights[own], settings, plan.workers)
        if member.checkpoint is not None:
            self.shard.load_state_dict(member.checkpoint.state(own),
                                       reset_workers=settings.reset_workers)
        self.inbox = Inbox(self.comm, self.shard.w.size, self.shard.w.dtype, plan.workers)
        self.outbox = Outbox(self.comm)
        self.headers = HeaderBox(self.comm, wire.TO_SERVER)
        self.gone: set[int] = set()  # workers
        self.signal: int | None = None
        self._sent: dict[tuple[int, int], MPI.Request] = {}
        self._looked = 0.0
        if member.checkpoint is not None or settings.broadcast:
            for m in range(plan.workers):
                for slot in range(settings.depth):
                    self._send(m, slot, self.shard.w_bak[m][slot])

    def apply(self, order: Commit) -> None:
        """One update, and the new weights to its worker."""
        push = self.inbox.first(order.worker)
        assert push.gradient is not None
        self._release(order.worker, order.slot)
        fresh = self.shard.commit(order, push.gradient)
        self.inbox.done(order.worker)
        self._send(order.worker, order.slot, fresh)

    def drop(self, worker: int, slot: int) -> None:
        """No update; the current weights to the worker."""
        self._release(worker, slot)
        self.inbox.done(worker)
        self._send(worker, slot, self.shard.refresh(worker, slot))

    def snapshot(self, worker: int) -> None:
        """This slice as it is now, to a worker that asked."""
        if worker not in self.gone:
            self.outbox.send(self.shard.w.copy(), self.plan.rank(worker), wire.SNAPSHOT)

    def forget(self, worker: int) -> None:
        """A worker no longer takes part; a push of it that is not committed is dropped whole."""
        self.gone.add(worker)
        self.inbox.forget(worker)
        self.outbox.forget(self.plan.rank(worker))

    def save(self, update: int) -> Mark:
        """Writes this slice into the checkpoint after ``update`` updates."""
        assert self.settings.checkpoint_dir is not None
        return save_shard(place(self.settings.checkpoint_dir, update), self.rank, self.plan.servers,
                          self.shard.state_dict())

    def gather(self) -> Array:
        """The whole weights (numel,), from all servers; all of them call it at the end.

        Raises:
            ServerLost: another server sent nothing within ``server_timeout``.
        """
        whole = np.empty(self.plan.numel, self.shard.w.dtype)
        whole[self.plan.slices[self.rank]] = self.shard.w
        others = [rank for rank in range(self.plan.servers) if rank != self.rank]
        for rank in others:
            self.outbox.send(self.shard.w, rank, wire.EXCHANGE)
        requests = {rank: self.comm.Irecv(whole[self.plan.slices[rank]], source=rank,
                                          tag=wire.EXCHANGE) for rank in others}
        patience = Patience(self.settings.server_timeout)
        while requests:
            waiting = {rank: request for rank, request in requests.items() if not request.Test()}
            if len(waiting) < len(requests):
                patience.reset()
            requests = waiting
            if requests and patience.over:
                raise ServerLost(f"no final weights from {ranks_text(requests)} within "
                                 f"{patience.limit:g} s (server_timeout)")
            self.outbox.prune()
            self.look()
            time.sleep(2e-4)
        return whole

    def flush(self) -> None:
        """Waits until everything has been sent, but not for ever."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while not self.outbox.empty and time.monotonic() < deadline:
            self.outbox.prune()
            self.look()
            time.sleep(2e-4)

    def close(self) -> None:
        """Gives MPI and the watch back."""
        self.headers.close()
        if self.member.host is not None:
            self.member.host.close()
        if self.member.guest is not None:
            self.member.guest.close()

    def look(self) -> None:
        """Now and then: what happened outside of the messages."""
        now = time.monotonic()
        if now - self._looked >= LOOK_EVERY:
            self._looked = now
            self.look_around(now)

    def look_around(self, now: float) -> None:
        """Raises or takes note of what has ended; for the roles to fill in."""
        raise NotImplementedError

    @contextlib.contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM are noted down and acted on between two updates, never within one."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _send(self, worker: int, slot: int, weights: Array) -> None:
        if worker not in self.gone:
            self._sent[worker, slot] = self.outbox.send(weights, self.plan.rank(worker),
                                                        wire.WEIGHTS)

    def _release(self, worker: int, slot: int) -> None:
        """Before a slot is overwritten: the send from it must be over.

        It is, since the worker computed on what it received; MPI may only not know it yet.
        """
        request = self._sent.pop((worker, slot), None)
        deadline = time.monotonic() + 5.0
        while request is not None and not request.Test():
            if time.monotonic() > deadline:
                self.shard.replace(worker, slot)
                return

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
from hvd_ext.checkpoint.files import FileDigest, checkpoint_dir

LOOK_EVERY = 0.02  # seconds between looks at the watch, the clock and the terminal
FLUSH_TIMEOUT_S = 30.0


class IdleTimeout:
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
            self.shard.load_state_dict(member.checkpoint.read_state(own),
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
                    self._send_weights(m, slot, self.shard.w_bak[m][slot])

    def apply_update(self, order: Commit) -> None:
        """One update, and the new weights to its worker."""
        push = self.inbox.oldest_push(order.worker)
        assert push.gradient is not None
        self._wait_slot(order.worker, order.slot)
        fresh = self.shard.commit_update(order, push.gradient)
        self.inbox.release_push(order.worker)
        self._send_weights(order.worker, order.slot, fresh)

    def drop_push(self, worker: int, slot: int) -> None:
        """No update; the current weights to the worker."""
        self._wait_slot(worker, slot)
        self.inbox.release_push(worker)
        self._send_weights(worker, slot, self.shard.copy_current(worker, slot))

    def send_snapshot(self, worker: int) -> None:
        """This slice as it is now, to a worker that asked."""
        if worker not in self.gone:
            self.outbox.start_send(self.shard.w.copy(), self.plan.rank(worker), wire.SNAPSHOT)

    def forget_worker(self, worker: int) -> None:
        """A worker no longer takes part; a push of it that is not committed is dropped whole."""
        self.gone.add(worker)
        self.inbox.forget_worker(worker)
        self.outbox.forget_rank(self.plan.rank(worker))

    def save_slice(self, update: int) -> FileDigest:
        """Writes this slice into the checkpoint after ``update`` updates."""
        assert self.settings.checkpoint_dir is not None
        return save_shard(checkpoint_dir(self.settings.checkpoint_dir, update), self.rank, self.plan.servers,
                          self.shard.state_dict())

    def gather_weights(self) -> Array:
        """The whole weights (numel,), from all servers; all of them call it at the end.

        Raises:
            ServerLost: another server sent nothing within ``server_timeout``.
        """
        whole = np.empty(self.plan.numel, self.shard.w.dtype)
        whole[self.plan.slices[self.rank]] = self.shard.w
        others = [rank for rank in range(self.plan.servers) if rank != self.rank]
        for rank in others:
            self.outbox.start_send(self.shard.w, rank, wire.EXCHANGE)
        requests = {rank: self.comm.Irecv(whole[self.plan.slices[rank]], source=rank,
                                          tag=wire.EXCHANGE) for rank in others}
        patience = IdleTimeout(self.settings.server_timeout)
        while requests:
            waiting = {rank: request for rank, request in requests.items() if not request.Test()}
            if len(waiting) < len(requests):
                patience.reset()
            requests = waiting
            if requests and patience.over:
                raise ServerLost(f"no final weights from {ranks_text(requests)} within "
                                 f"{patience.limit:g} s (server_timeout)")
            self.outbox.poll_sends()
            self.poll_process()
            time.sleep(2e-4)
        return whole

    def flush_sends(self) -> None:
        """Waits until everything has been sent, but not for ever."""
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while not self.outbox.empty and time.monotonic() < deadline:
            self.outbox.poll_sends()
            self.poll_process()
            time.sleep(2e-4)

    def close(self) -> None:
        """Gives MPI and the watch back."""
        self.headers.close()
        if self.member.host is not None:
            self.member.host.close()
        if self.member.guest is not None:
            self.member.guest.close()

    def poll_process(self) -> None:
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

    def _send_weights(self, worker: int, slot: int, weights: Array) -> None:
        if worker not in self.gone:
            self._sent[worker, slot] = self.outbox.start_send(weights, self.plan.rank(worker),
                                                              wire.WEIGHTS)

    def _wait_slot(self, worker: int, slot: int) -> None:
        """Before a slot is overwritten: the send from it must be over.

        It is, since the worker computed on what it received; MPI may only not know it yet.
        """
        request = self._sent.pop((worker, slot), None)
        deadline = time.monotonic() + 5.0
        while request is not None and not request.Test():
            if time.monotonic() > deadline:
                self.shard.replace_buffer(worker, slot)
                return

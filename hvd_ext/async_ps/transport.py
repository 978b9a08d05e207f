"""Sends that are kept until they are done, pushes that are collected until they are whole."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from hvd_ext.async_ps import wire
from hvd_ext.async_ps.model import Array


class Outbox:
    """Non-blocking sends; each keeps its buffer until MPI has let go of it."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm
        self._pending: list[tuple[MPI.Request, int, Any]] = []
        self._abandoned: list[tuple[MPI.Request, int, Any]] = []

    def start_send(self, buffer: Any, rank: int, tag: int) -> MPI.Request:
        """Starts a send; the buffer must not change before it is done."""
        request = self._comm.Isend(buffer, dest=rank, tag=tag)
        self._pending.append((request, rank, buffer))
        return request

    def send_header(self, made: wire.Header, rank: int, tag: int) -> None:
        """Starts to send a header."""
        self.start_send(wire.header_bytes(made), rank, tag)

    def poll_sends(self) -> None:
        """Lets MPI move on, forgets what is done."""
        self._pending = [entry for entry in self._pending if not entry[0].Test()]

    def forget_rank(self, rank: int) -> None:
        """A rank is gone: what it will never take is kept aside, its buffers untouched."""
        self._abandoned += [entry for entry in self._pending if entry[1] == rank]
        self._pending = [entry for entry in self._pending if entry[1] != rank]

    @property
    def empty(self) -> bool:
        """Whether everything has been sent."""
        return not self._pending


def receive_text(comm: MPI.Comm, size: int, rank: int, seconds: float) -> str:
    """A text that a rank has announced; what is known of it when the rank does not send it in time."""
    text = np.empty(size, dtype=np.uint8)
    request = comm.Irecv(text, source=rank, tag=wire.TEXT)
    deadline = time.monotonic() + seconds
    while not request.Test():
        if time.monotonic() > deadline:
            _UNANSWERED.append((request, text))
            return f"(rank {rank} announced a reason and did not send it)"
        time.sleep(1e-3)
    return text.tobytes().decode()


_UNANSWERED: list[Any] = []  # receives that were given up; MPI may still write into their memory


class HeaderBox:
    """Receives headers of one tag from anybody, one receive always posted."""

    def __init__(self, comm: MPI.Comm, tag: int) -> None:
        self._comm = comm
        self._tag = tag
        self._header = wire.make_header(0)
        self._status = MPI.Status()
        self._post_receive()

    def _post_receive(self) -> None:
        self._request = self._comm.Irecv(wire.header_bytes(self._header), source=MPI.ANY_SOURCE,
                                         tag=self._tag)

    def next_header(self) -> tuple[int, Any] | None:
        """The next header as (rank, record), or None."""
        if not self._request.Test(self._status):
            return None
        rank, record = self._status.Get_source(), self._header[0].copy()
        self._post_receive()
        return rank, record

    def close(self) -> None:
        """Takes the posted receive back."""
        self._request.Cancel()
        self._request.Wait()


@dataclass
class Push:
    """A worker's gradient on its way in; ``gradient`` (n,) is None when it is not finite."""

    worker: int
    step: int
    gradient: Array | None
    request: MPI.Request | None
    announced: bool = False

    @property
    def whole(self) -> bool:
        """Whether all of it has arrived."""
        if self.request is not None and self.request.Test():
            self.request = None
        return self.request is None


class Inbox:
    """Pushes by worker, in the order they were sent.

    Args:
        comm: the run's communicator.
        size, dtype: of this server's slice.
        workers: how many.
    """

    def __init__(self, comm: MPI.Comm, size: int, dtype: np.dtype[Any], workers: int) -> None:
        self._comm = comm
        self._size = size
        self._dtype = dtype
        self._pushes: list[deque[Push]] = [deque() for _ in range(workers)]
        self._free: list[Array] = []
        self._abandoned: list[Push] = []

    def expect_push(self, worker: int, rank: int, step: int, *, finite: bool) -> None:
        """A header announced a push."""
        if not finite:
            self._pushes[worker].append(Push(worker, step, None, None))
            return
        gradient = self._free.pop() if self._free else np.empty(self._size, self._dtype)
        request = self._comm.Irecv(gradient, source=rank, tag=wire.GRADIENT)
        self._pushes[worker].append(Push(worker, step, gradient, request))

    def arrived_pushes(self) -> list[Push]:
        """The first push of each worker that is whole and was not announced before."""
        ready = []
        for pushes in self._pushes:
            for push in pushes:
                if not push.whole:
                    break
                if not push.announced:
                    push.announced = True
                    ready.append(push)
        return ready

    def oldest_push(self, worker: int) -> Push:
        """A worker's oldest push."""
        return self._pushes[worker][0]

    def release_push(self, worker: int) -> None:
        """The oldest push has been applied or dropped; its buffer serves again."""
        push = self._pushes[worker].popleft()
        if push.gradient is not None:
            self._free.append(push.gradient)

    def forget_worker(self, worker: int) -> None:
        """A worker is gone: what has not arrived whole is never looked at again."""
        self._abandoned += self._pushes[worker]
        self._pushes[worker].clear()

"""A server that owns a slice and follows the primary server's orders."""

from __future__ import annotations

import signal
import time
from typing import Any

from hvd_ext.async_ps import wire
from hvd_ext.async_ps.config import ServerSettings
from hvd_ext.async_ps.errors import ServerLost, ServerStopped
from hvd_ext.async_ps.model import Array
from hvd_ext.async_ps.plan import Plan
from hvd_ext.async_ps.registration import Membership
from hvd_ext.async_ps.sequencer import Commit
from hvd_ext.async_ps.server import FLUSH_SECONDS, Patience, Server
from hvd_ext.async_ps.transport import HeaderBox, receive_text

LAST_WORDS = 5.0  # seconds in which a slice may still arrive after the primary has gone


class Secondary(Server):
    """Confirms to the primary what has arrived whole, applies it on the primary's command."""

    def __init__(self, plan: Plan, member: Membership, settings: ServerSettings, weights: Array) -> None:
        super().__init__(plan, member, settings, weights)
        self._orders = HeaderBox(self.comm, wire.ORDER)
        self._orders_awaited = Patience(settings.server_timeout)
        self._ended = False
        self._gathered = False
        self._primary_gone: float | None = None
        self._interrupted = False

    def serve(self) -> Array:
        """Serves until the primary says that the run is over; the final weights (numel,).

        Raises:
            ServerLost: the primary server died.
            ServerStopped: the primary server stopped the run.
        """
        idle = wire.Idle()
        self._orders_awaited.reset()
        with self.catching_signals():
            try:
                while not self._ended:
                    if self._take():
                        idle.reset()
                    else:
                        idle.wait()
                    self.look()
                whole = self.gather()
                self._gathered = True
                self.flush()
                # The primary must not take the end of this rank for a loss: it goes first.
                deadline = time.monotonic() + FLUSH_SECONDS
                while (self._primary_gone is None and self._watching
                       and time.monotonic() < deadline):
                    self.look()
                    time.sleep(1e-3)
                return whole
            except (ServerLost, ServerStopped):
                raise
            except Exception as error:
                self._tell_failure(error)
                raise
            finally:
                self.close()

    def _tell_failure(self, error: Exception) -> None:
        """Tells the primary why this server ends."""
        text = bytearray(repr(error).encode())
        self._confirm(wire.header(wire.FAILED, size=len(text)))
        self.outbox.send(text, 0, wire.TEXT)
        patience = Patience(LAST_WORDS)
        while not self.outbox.empty and not patience.over:
            self.outbox.prune()
            time.sleep(1e-3)

    @property
    def _watching(self) -> bool:
        return self.member.guest is not None and self.member.guest.connected

    def close(self) -> None:
        """Gives MPI and the watch back."""
        self._orders.close()
        super().close()

    def _take(self) -> bool:
        busy = False
        while (arrived := self.headers.take()) is not None:
            busy = True
            rank, message = arrived
            m = self.plan.worker(rank)
            if m not in self.gone:
                self.inbox.expect(m, rank, int(message["step"]), finite=message["kind"] == wire.PUSH)
        for push in self.inbox.arrived():
            busy = True
            self._confirm(wire.header(wire.RECEIVED, worker=push.worker, step=push.step))
        while not self._ended and (arrived := self._orders.take()) is not None:
            busy = True
            self._orders_awaited.reset()
            self._obey(arrived[1])
        self.outbox.prune()
        return busy

    def _confirm(self, made: wire.Header) -> None:
        self.outbox.header(made, 0, wire.CONFIRM)

    def _obey(self, message: Any) -> None:
        kind, m = message["kind"], int(message["worker"])
        if kind == wire.COMMIT:
            self.apply(Commit(int(message["update"]), m, int(message["step"]), int(message["version"]),
                              float(message["lr"]), float(message["momentum"])))
        elif kind == wire.DROP:
            self.drop(m, int(message["step"]))
        elif kind == wire.FORGET:
            self.forget(m)
        elif kind == wire.SEND_SNAPSHOT:
            self.snapshot(m)
        elif kind == wire.SAVE:
            size, digest = self.save(int(message["update"]))
            self._confirm(wire.header(wire.SAVED, size=size, version=digest))
        elif kind == wire.ASK_ALIVE:
            self._confirm(wire.header(wire.ALIVE))
        elif kind == wire.END:
            self._ended = True
        elif kind == wire.STOP:
            kind_of = ServerLost if message["version"] else ServerStopped
            raise kind_of(receive_text(self.comm, int(message["size"]), 0, LAST_WORDS))

    def look_around(self, now: float) -> None:
        """The primary's process, and signals, which are the primary's to act on."""
        assert self.member.guest is not None
        if self.signal is not None and not self._interrupted:
            self._interrupted = True
            self._confirm(wire.header(wire.INTERRUPTED, size=int(signal.Signals(self.signal))))
        if self._primary_gone is None and self.member.guest.lost():
            self._primary_gone = now
        if self._primary_gone is None and not self._gathered and self._orders_awaited.over:
            raise ServerLost(f"the primary server (rank 0) said nothing for "
                             f"{self._orders_awaited.limit:g} s (server_timeout); start again with "
                             "resume= and the folder given as checkpoint_dir")
        if self._primary_gone is None or self._gathered:
            return
        while not self._ended and (arrived := self._orders.take()) is not None:
            self._obey(arrived[1])  # it may have said why
        if not self._ended or now - self._primary_gone > LAST_WORDS:
            raise ServerLost(
                "the primary server (rank 0) is lost; start again with resume= and the folder "
                "given as checkpoint_dir"
            )

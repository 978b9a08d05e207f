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
from hvd_ext.async_ps.server import FLUSH_TIMEOUT_S, IdleTimeout, Server
from hvd_ext.async_ps.transport import HeaderBox, receive_text

LAST_WORDS = 5.0  # seconds in which a slice may still arrive after the primary has gone


class Secondary(Server):
    """Confirms to the primary what has arrived whole, applies it on the primary's command."""

    def __init__(self, plan: Plan, member: Membership, settings: ServerSettings, weights: Array) -> None:
        super().__init__(plan, member, settings, weights)
        self._orders = HeaderBox(self.comm, wire.ORDER)
        self._orders_awaited = IdleTimeout(settings.server_timeout)
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
        idle = wire.Backoff()
        self._orders_awaited.reset()
        with self.catching_signals():
            try:
                while not self._ended:
                    if self._receive_arrived():
                        idle.reset()
                    else:
                        idle.wait()
                    self.poll_process()
                whole = self.gather_weights()
                self._gathered = True
                self.flush_sends()
                # The primary must not take the end of this rank for a loss: it goes first.
                deadline = time.monotonic() + FLUSH_TIMEOUT_S
                while (self._primary_gone is None and self._watching
                       and time.monotonic() < deadline):
                    self.poll_process()
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
        self._confirm_slice(wire.make_header(wire.FAILED, size=len(text)))
        self.outbox.start_send(text, 0, wire.TEXT)
        patience = IdleTimeout(LAST_WORDS)
        while not self.outbox.empty and not patience.over:
            self.outbox.poll_sends()
            time.sleep(1e-3)

    @property
    def _watching(self) -> bool:
        return self.member.guest is not None and self.member.guest.connected

    def close(self) -> None:
        """Gives MPI and the watch back."""
        self._orders.close()
        super().close()

    def _receive_arrived(self) -> bool:
        busy = False
        while (arrived := self.headers.next_header()) is not None:
            busy = True
            rank, message = arrived
            m = self.plan.worker_number(rank)
            if m not in self.gone:
                self.inbox.expect_push(m, rank, int(message["step"]), finite=message["kind"] == wire.PUSH)
        for push in self.inbox.arrived_pushes():
            busy = True
            self._confirm_slice(wire.make_header(wire.RECEIVED, worker=push.worker, step=push.step))
        while not self._ended and (arrived := self._orders.next_header()) is not None:
            busy = True
            self._orders_awaited.reset()
            self._on_order(arrived[1])
        self.outbox.poll_sends()
        return busy

    def _confirm_slice(self, made: wire.Header) -> None:
        self.outbox.send_header(made, 0, wire.CONFIRM)

    def _on_order(self, message: Any) -> None:
        kind, m = message["kind"], int(message["worker"])
        if kind == wire.COMMIT:
            self.apply_update(Commit(int(message["update"]), m, int(message["step"]), int(message["version"]),
                                     float(message["lr"]), float(message["momentum"])))
        elif kind == wire.DROP:
            self.drop_push(m, int(message["step"]))
        elif kind == wire.FORGET:
            self.forget_worker(m)
        elif kind == wire.SEND_SNAPSHOT:
            self.send_snapshot(m)
        elif kind == wire.SAVE:
            size, digest = self.save_slice(int(message["update"]))
            self._confirm_slice(wire.make_header(wire.SAVED, size=size, version=digest))
        elif kind == wire.ASK_ALIVE:
            self._confirm_slice(wire.make_header(wire.ALIVE))
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
            self._confirm_slice(wire.make_header(wire.INTERRUPTED, size=int(signal.Signals(self.signal))))
        if self._primary_gone is None and self.member.guest.primary_lost():
            self._primary_gone = now
        if self._primary_gone is None and not self._gathered and self._orders_awaited.over:
            raise ServerLost(f"the primary server (rank 0) said nothing for "
                             f"{self._orders_awaited.limit:g} s (server_timeout); start again with "
                             "resume= and the folder given as checkpoint_dir")
        if self._primary_gone is None or self._gathered:
            return
        while not self._ended and (arrived := self._orders.next_header()) is not None:
            self._on_order(arrived[1])  # it may have said why
        if not self._ended or now - self._primary_gone > LAST_WORDS:
            raise ServerLost(
                "the primary server (rank 0) is lost; start again with resume= and the folder "
                "given as checkpoint_dir"
            )

"""Primary server (rank 0): orders all updates and monitors workers and servers."""

from __future__ import annotations

import math
import secrets
import signal
import time
from collections import Counter, deque
from typing import Any

from hvd_ext.async_ps import wire
from hvd_ext.async_ps.checkpoint import finalize_checkpoint
from hvd_ext.async_ps.config import ServerSettings
from hvd_ext.async_ps.errors import ServerLost, ServerStopped
from hvd_ext.async_ps.exit_deadline import set_exit_deadline
from hvd_ext.async_ps.model import Array, FlatModel
from hvd_ext.async_ps.plan import Plan
from hvd_ext.async_ps.progress import Display
from hvd_ext.async_ps.registration import Membership
from hvd_ext.async_ps.report import DEAD, Report
from hvd_ext.async_ps.sequencer import Commit, Sequencer
from hvd_ext.async_ps.server import IdleTimeout, Server, ranks_text
from hvd_ext.async_ps.transport import HeaderBox, receive_text
from hvd_ext.checkpoint.files import FileDigest, checkpoint_dir, latest_checkpoint

REASON_TIMEOUT_S = 2.0  # in which a reason that was announced must arrive


class Primary(Server):
    """Serves its slice, orders the updates of all slices, watches workers and servers.

    An update is committed once every server has the whole of its slice of the gradient; only then
    is any of it applied.
    """

    def __init__(self, plan: Plan, member: Membership, settings: ServerSettings, weights: Array,
                 model: FlatModel) -> None:
        super().__init__(plan, member, settings, weights)
        self.books = Sequencer(settings, plan, weights.itemsize)
        if member.checkpoint is not None:
            self.books.load_state_dict(member.checkpoint.manifest["books"],
                                       member.checkpoint.read_recording(),
                                       reset_workers=settings.reset_workers)
        self.display = Display(enabled=settings.progress, total=settings.total_updates)
        self.others = range(1, plan.servers)
        self._dtype = str(model.dtype)
        self._shapes = [tuple(shape) for shape in model.shapes]
        self._confirms = HeaderBox(self.comm, wire.CONFIRM)
        self._confirmed: Counter[tuple[int, int]] = Counter()
        self._received: deque[tuple[int, int]] = deque()
        self._silent: set[int] = set()  # workers left out whose process has not ended
        self._saved: dict[int, FileDigest] = {}
        self._seen = [time.monotonic()] * plan.workers
        self._answered = {rank: time.monotonic() for rank in self.others}
        self._asked = time.monotonic()
        self._run = self._run_number()

    def _run_number(self) -> str:
        """What names this run in its checkpoints: also that of the run it goes on from, in its folder."""
        resumed, folder = self.member.checkpoint, self.settings.checkpoint_dir
        if resumed is not None and folder is not None \
                and resumed.folder.resolve().parent == folder.resolve():
            return str(resumed.manifest["run"])
        return secrets.token_hex(8)

    def serve(self) -> tuple[Report, Array]:
        """Serves until every worker has finished or is left out.

        Returns:
            The report and the final weights (numel,).

        Raises:
            ServerLost: another server died.
            ServerStopped: no worker is left, or the schedule of lr failed.
            KeyboardInterrupt, SystemExit: stopped by Ctrl-C or SIGTERM, after a checkpoint.
        """
        self._seen = [time.monotonic()] * self.plan.workers
        self._answered = {rank: time.monotonic() for rank in self.others}
        self.books.start_clock()
        idle = wire.Backoff()
        with self.catching_signals():
            try:
                while not self._all_settled():
                    if self._receive_arrived():
                        idle.reset()
                    else:
                        idle.wait()
                    self.poll_process()
                return self._finish_run()
            except ServerLost as error:
                self._stop_all(str(error), lost=True)
                raise
            except (KeyboardInterrupt, SystemExit):
                raise
            except Exception as error:
                self._stop_all(f"the server failed: {error!r}")
                raise
            finally:
                self.display.close()
                self.close()

    def close(self) -> None:
        """Gives MPI and the watch back."""
        self._confirms.close()
        super().close()

    def _all_settled(self) -> bool:
        return all(record.finished or m in self.gone for m, record in enumerate(self.books.workers))

    def _receive_arrived(self) -> bool:
        """One round through everything that may have arrived; whether anything had."""
        busy = False
        while (arrived := self.headers.next_header()) is not None:
            busy = True
            self._on_header(arrived[0], arrived[1])
        for push in self.inbox.arrived_pushes():
            busy = True
            self._on_slice_received(push.worker, push.step)
        self._take_confirms()
        while self._received:
            busy = True
            self._on_slice_received(*self._received.popleft())
        self.outbox.poll_sends()
        return busy

    def _take_confirms(self) -> None:
        """What other servers say; pushes wait in line, for a checkpoint may be under way."""
        while (arrived := self._confirms.next_header()) is not None:
            rank, message = arrived
            kind = message["kind"]
            self._answered[rank] = time.monotonic()
            if kind == wire.RECEIVED:
                self._received.append((int(message["worker"]), int(message["step"])))
            elif kind == wire.SAVED:
                self._saved[rank] = FileDigest(int(message["size"]), int(message["version"]))
            elif kind == wire.FAILED:
                why = receive_text(self.comm, int(message["size"]), rank, REASON_TIMEOUT_S)
                raise ServerLost(f"server rank {rank} failed after {self.books.update} updates: "
                                 f"{why}; " + self._way_back())
            elif kind == wire.INTERRUPTED and self.signal is None:
                self.signal = int(message["size"])

    def _on_header(self, rank: int, message: Any) -> None:
        """A header from a worker."""
        m = self.plan.worker_number(rank)
        self._seen[m] = time.monotonic()
        kind = message["kind"]
        if m in self.gone:  # what a dead worker had sent may come in late; nobody waits for it
            if m in self._silent:
                self.outbox.send_header(wire.make_header(wire.LEFT_OUT), rank, wire.REPLY)
        elif kind in (wire.PUSH, wire.PUSH_NOT_FINITE):
            self.inbox.expect_push(m, rank, int(message["step"]), finite=kind == wire.PUSH)
        elif kind == wire.ASK_SNAPSHOT:
            self._broadcast_order(wire.make_header(wire.SEND_SNAPSHOT, worker=m))
            self.outbox.send_header(wire.make_header(wire.SNAPSHOT_READY, update=self.books.update), rank,
                                    wire.REPLY)
            self.send_snapshot(m)
        elif kind == wire.FINISH:
            self.books.workers[m].finished = True
        elif kind == wire.LEAVE:
            self._evict_worker(m, "it left with an error of its own")
            assert self.member.host is not None
            self.member.host.forget_rank(rank)

    def _on_slice_received(self, m: int, step: int) -> None:
        """One more server has the whole of its slice of a push; commit when all have."""
        self._confirmed[m, step] += 1
        if self._confirmed[m, step] < self.plan.servers:
            return
        del self._confirmed[m, step]
        if m in self.gone:
            return
        reply = {"worker": m, "step": step}
        if self.inbox.oldest_push(m).gradient is None:
            slot = self.books.drop_push(m)
            self._broadcast_order(wire.make_header(wire.DROP, worker=m, step=slot))
            self.drop_push(m, slot)
            record = self.books.workers[m]
            if record.not_finite == 1:
                self.display.print_line(f"async: a gradient of worker {m} (rank {record.rank}) is not "
                                        "finite; dropped, and further ones are counted")
        else:
            made = self.books.commit_push(m)
            self._broadcast_order(_order_of(made))
            self.apply_update(made)
        self.outbox.send_header(wire.make_header(wire.PULLED, update=self.books.update, **reply),
                                self.plan.rank(m), wire.REPLY)
        every = self.settings.checkpoint_every
        if every is not None and self.books.update % every == 0:
            self.write_checkpoint()

    def _broadcast_order(self, made: wire.Header) -> None:
        for rank in self.others:
            self.outbox.send_header(made.copy(), rank, wire.ORDER)

    def write_checkpoint(self) -> None:
        """All servers write the state between two updates."""
        assert self.settings.checkpoint_dir is not None
        folder = checkpoint_dir(self.settings.checkpoint_dir, self.books.update)
        if latest_checkpoint(folder) is not None or self.books.update == self._resumed_at():
            return
        self._saved = {}
        self._broadcast_order(wire.make_header(wire.SAVE, update=self.books.update))
        self._saved[0] = self.save_slice(self.books.update)
        patience = IdleTimeout(self._server_limit)
        while missing := set(self.others) - set(self._saved):
            self._take_confirms()
            self.outbox.poll_sends()
            self._look_at_processes()
            if patience.over:
                raise ServerLost(f"{ranks_text(missing)} did not write the checkpoint after "
                                 f"{self.books.update} updates within {patience.limit:g} s "
                                 "(server_timeout); " + self._way_back())
            time.sleep(2e-4)
        finalize_checkpoint(folder, self.plan, self.settings, self.books.state_dict(), self.books.recording,
                            self._saved, run=self._run, dtype=self._dtype, shapes=self._shapes)
        self._seen = [time.monotonic()] * self.plan.workers
        self._answered = {rank: time.monotonic() for rank in self.others}

    def _resumed_at(self) -> int:
        return self.member.checkpoint.update if self.member.checkpoint is not None else -1

    def look_around(self, now: float) -> None:
        """Processes that ended, workers that are silent, signals, the terminal."""
        self._look_at_processes()
        self._look_at_servers(now)
        limit = self.settings.worker_timeout
        a_server_is_silent = any(now - self._answered[rank] > self._detection_time / 2
                                 for rank in self.others)
        for m, record in enumerate(self.books.workers):
            if a_server_is_silent:  # a worker may be waiting for it: for its part of a push or of weights
                self._seen[m] = now
            silent = now - self._seen[m]
            if limit is not None and silent > limit and m not in self.gone and not record.finished:
                self._evict_worker(m, f"silent for {silent:.0f} s (worker_timeout={limit:g})", alive=True)
        if self.signal is not None:
            number, self.signal = self.signal, None
            self._on_signal(number)
        if self.display.is_due():
            self.display.show_report(self.books.report())

    def _look_at_servers(self, now: float) -> None:
        """Ask the other servers now and then whether they are alive, also when no worker pushes.

        Raises:
            ServerLost: one said nothing for too long.
        """
        limit = self._server_limit
        stalled = [rank for rank in self.others
                   if limit is not None and now - self._answered[rank] > limit]
        if stalled:
            raise ServerLost(f"{ranks_text(stalled)} said nothing for {limit:g} s (server_timeout="
                             f"{self.settings.server_timeout:g}) after {self.books.update} updates; "
                             + self._way_back())
        if now - self._asked > self._detection_time / 4 and self.others:
            self._asked = now
            self._broadcast_order(wire.make_header(wire.ASK_ALIVE))

    @property
    def _server_limit(self) -> float | None:
        """Seconds a server may say nothing: fewer than workers wait, so that they are told who it is."""
        limit = self.settings.server_timeout
        return None if limit is None else 0.75 * limit

    @property
    def _detection_time(self) -> float:
        """Seconds within which it must be known who is silent."""
        limits = (self.settings.server_timeout, self.settings.worker_timeout)
        return min(limit for limit in (*limits, math.inf) if limit is not None)

    def _look_at_processes(self) -> None:
        assert self.member.host is not None
        for rank in self.member.host.dead_ranks():
            if self.plan.is_server(rank):
                raise ServerLost(f"server rank {rank} is lost after {self.books.update} updates; "
                                 + self._way_back())
            m = self.plan.worker_number(rank)
            if self.books.workers[m].finished:
                self.forget_worker(m)
            elif m not in self.gone:
                set_exit_deadline()
                self._evict_worker(m, DEAD)

    def _evict_worker(self, m: int, why: str, *, alive: bool = False) -> None:
        record = self.books.workers[m]
        record.left_out = why
        self._broadcast_order(wire.make_header(wire.FORGET, worker=m))
        self.forget_worker(m)
        if alive:
            self._silent.add(m)
            self.outbox.send_header(wire.make_header(wire.LEFT_OUT), record.rank, wire.REPLY)
        self.display.print_line(f"async: worker {m} (rank {record.rank}) is left out after {record.updates} "
                                f"updates: {why}")

    def _way_back(self) -> str:
        folder = self.settings.checkpoint_dir
        found = latest_checkpoint(folder) if folder is not None else None
        if found is None:
            return "there is no checkpoint; pass checkpoint_dir and checkpoint_every"
        return f"start again with resume={str(found)!r}"

    def _on_signal(self, number: int) -> None:
        if self.settings.checkpoint_dir is not None:
            self.write_checkpoint()
        message = (f"stopped by {signal.Signals(number).name} after {self.books.update} updates; "
                + self._way_back())
        self.display.print_line(f"async: {message}")
        self._stop_all(message)
        if number == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(128 + number)

    def _stop_all(self, why: str, *, lost: bool = False) -> None:
        """Tells everybody that the run is over, and why."""
        text = bytearray(why.encode())
        self._broadcast_order(wire.make_header(wire.STOP, size=len(text), version=lost))
        for rank in self.others:
            self.outbox.start_send(text, rank, wire.TEXT)
        for m in range(self.plan.workers):
            if m not in self.gone:
                rank = self.plan.rank(m)
                made = wire.make_header(wire.STOPPED, size=len(text), version=lost)
                self.outbox.send_header(made, rank, wire.REPLY)
                self.outbox.start_send(text, rank, wire.TEXT)
        deadline = time.monotonic() + 0.5
        while not self.outbox.empty and time.monotonic() < deadline:
            self.outbox.poll_sends()
            time.sleep(1e-3)

    def _finish_run(self) -> tuple[Report, Array]:
        """Everybody gets the final weights."""
        if self.settings.checkpoint_dir is not None:
            self.write_checkpoint()
        if not any(record.finished for record in self.books.workers):
            raise ServerStopped(f"no worker is left after {self.books.update} updates; "
                                + self._way_back())
        report = self.books.report()
        if self.settings.progress:
            self.display.show_report(report)
        text = bytearray(report.to_json().encode())
        for m, record in enumerate(self.books.workers):
            if record.finished and m not in self.gone:
                self._broadcast_order(wire.make_header(wire.SEND_SNAPSHOT, worker=m))
                made = wire.make_header(wire.DONE, update=self.books.update, size=len(text))
                self.outbox.send_header(made, record.rank, wire.REPLY)
                self.outbox.start_send(text, record.rank, wire.TEXT)
                self.send_snapshot(m)
        self._broadcast_order(wire.make_header(wire.END))
        whole = self.gather_weights()
        self.flush_sends()
        return report, whole


def _order_of(made: Commit) -> wire.Header:
    return wire.make_header(wire.COMMIT, worker=made.worker, step=made.slot, version=made.delay,
                            update=made.update, lr=made.lr, momentum=made.momentum)

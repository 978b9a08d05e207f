"""A worker: push a gradient and pull the next weights, in one round trip."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from mpi4py import MPI

from hvd_ext.async_ps import wire
from hvd_ext.async_ps.config import ServerSettings
from hvd_ext.async_ps.errors import ServerLost, ServerStopped, WorkerEvicted
from hvd_ext.async_ps.exit_deadline import set_exit_deadline
from hvd_ext.async_ps.model import Array, FlatModel
from hvd_ext.async_ps.plan import Plan
from hvd_ext.async_ps.registration import Membership
from hvd_ext.async_ps.report import DEAD, Report
from hvd_ext.async_ps.transport import Outbox

LAST_WORDS = 2.0  # seconds in which a reason may still arrive after the primary has gone


class Worker:
    """One worker rank.

    Push p is computed at the weights in buffer ``p % depth``; the answer to it lands there again.
    With prefetch (depth 2) the worker goes on with the answer to the push before the last one,
    while the last one still travels.

    Args:
        plan, member, settings: of the run.
        model: this rank's model; its weights are set here when a run is resumed or broadcast.
    """

    def __init__(self, plan: Plan, member: Membership, settings: ServerSettings,
                 model: FlatModel) -> None:
        self.plan = plan
        self.settings = settings
        self.member = member
        self.comm = member.comm
        self.number = plan.worker_number(self.comm.rank)
        self.pushes = 0
        self.update = 0
        self.waited = 0.0
        self._weights = [model.new_buffer() for _ in range(settings.depth)]
        self._gradients = [model.new_buffer() for _ in range(settings.depth)]
        self._limit = settings.rule.largest_gradient(model.dtype)
        self._outbox = Outbox(self.comm)
        self._sends: list[list[MPI.Request]] = [[] for _ in self._gradients]
        self._answers: list[list[MPI.Request]] = []  # weights under way, by push
        self._checked = 0.0
        for buffer in self._weights:
            buffer.take_weights()
        if member.checkpoint is not None:
            self.update = member.checkpoint.update
            if not settings.reset_workers:
                self.pushes = int(member.checkpoint.manifest["books"]["counts"][self.number])
        if member.checkpoint is not None or settings.broadcast:
            for buffer in self._weights:
                self._wait_for(self._receive_slices(buffer.wire), settings.start_timeout)
            self.put_back()

    def step(self) -> None:
        """Pushes the model's gradients, puts the weights for the next mini-batch into the model.

        Raises:
            ServerLost, ServerStopped, WorkerEvicted: the run is over for this worker.
        """
        slot = self.pushes % self.settings.depth
        gradient = self._gradients[slot]
        self._wait_for(self._sends[slot], self.settings.server_timeout)
        gradient.take_gradients()
        self._sends[slot] = []
        finite = gradient.max_magnitude() < self._limit  # False for NaN too
        made = wire.make_header(wire.PUSH if finite else wire.PUSH_NOT_FINITE, worker=self.number,
                                step=self.pushes)
        for rank, part in enumerate(self.plan.slices):
            self._outbox.send_header(made, rank, wire.TO_SERVER)
            if finite:
                self._sends[slot].append(
                    self._outbox.start_send(gradient.wire[part], rank, wire.GRADIENT))
        self._answers.append(self._receive_slices(self._weights[slot].wire))
        self.pushes += 1
        if len(self._answers) == self.settings.depth:
            self._pull_weights()
        self.put_back()

    def _pull_weights(self) -> None:
        """Waits for the answer to the oldest push."""
        began = time.perf_counter()
        self.update = int(self._receive_reply(wire.PULLED)["update"])
        self._wait_for(self._answers.pop(0), self.settings.server_timeout)
        self._outbox.poll_sends()
        self.waited += time.perf_counter() - began

    def snapshot(self) -> tuple[int, Array]:
        """All servers' weights between two updates: how many updates so far, and w (numel,)."""
        self._drain_answers()
        whole = np.empty(self.plan.numel, self._weights[0].read_entries().dtype)
        requests = self._receive_slices(whole, wire.SNAPSHOT)
        self._outbox.send_header(wire.make_header(wire.ASK_SNAPSHOT), 0, wire.TO_SERVER)
        update = int(self._receive_reply(wire.SNAPSHOT_READY)["update"])
        self._wait_for(requests, self.settings.server_timeout)
        return update, whole

    def put_back(self) -> None:
        """Puts the weights the next gradient belongs to into the model."""
        self._weights[self.pushes % self.settings.depth].put_weights()

    def ping(self) -> None:
        """Says that this worker is alive, in long pauses between steps."""
        self._outbox.send_header(wire.make_header(wire.PING), 0, wire.TO_SERVER)
        self._outbox.poll_sends()

    def finish(self) -> Report:
        """Waits until all workers are done; the final weights are then in the model.

        Returns:
            The primary server's report.

        Raises:
            ServerLost, ServerStopped, WorkerEvicted: the run is over for this worker.
        """
        self._drain_answers()
        requests = self._receive_slices(self._weights[0].wire, wire.SNAPSHOT)
        self._outbox.send_header(wire.make_header(wire.FINISH), 0, wire.TO_SERVER)
        reply = self._receive_reply(wire.DONE, patient=True)
        report = Report.from_json(self._receive_text(int(reply["size"])))
        self._wait_for(requests, self.settings.server_timeout)
        if any(worker.left_out == DEAD for worker in report.workers):
            set_exit_deadline()
        self.update = int(reply["update"])
        self._weights[0].put_weights()
        self.close()
        return report

    def leave_run(self) -> None:
        """Ends this worker's part after an error of its own; the others go on."""
        self._outbox.send_header(wire.make_header(wire.LEAVE), 0, wire.TO_SERVER)
        assert self.member.guest is not None
        deadline = time.monotonic() + LAST_WORDS
        while not self.member.guest.primary_lost() and time.monotonic() < deadline:  # not yet heard
            self._outbox.poll_sends()
            time.sleep(1e-3)
        self.close()

    def close(self) -> None:
        """Gives the watch back."""
        assert self.member.guest is not None
        self.member.guest.close()

    def _drain_answers(self) -> None:
        """Takes the answers that are still under way; the newest is not used."""
        while self._answers:
            self._pull_weights()

    def _receive_slices(self, buffer: Any, tag: int = wire.WEIGHTS) -> list[MPI.Request]:
        return [self.comm.Irecv(buffer[part], source=rank, tag=tag)
                for rank, part in enumerate(self.plan.slices)]

    def _receive_reply(self, kind: int, *, patient: bool = False) -> Any:
        """The primary's next header, which must be of this kind."""
        made = wire.make_header(0)
        request = self.comm.Irecv(wire.header_bytes(made), source=0, tag=wire.REPLY)
        self._wait_for([request], None if patient else self.settings.server_timeout)
        message = made[0]
        if message["kind"] == wire.LEFT_OUT:
            self.close()
            raise WorkerEvicted(
                f"worker {self.number} (rank {self.comm.rank}) was left out: it was silent for "
                f"longer than worker_timeout={self.settings.worker_timeout}; raise it, or call "
                "ping() in long pauses"
            )
        if message["kind"] == wire.STOPPED:
            text = self._receive_text(int(message["size"]))
            self.close()
            raise (ServerLost if message["version"] else ServerStopped)(text)
        if message["kind"] != kind:
            raise RuntimeError(f"expected message {kind} from the primary server, got {message}")
        return message

    def _receive_text(self, size: int) -> str:
        text = np.empty(size, dtype=np.uint8)
        self._wait_for([self.comm.Irecv(text, source=0, tag=wire.TEXT)], LAST_WORDS)
        return text.tobytes().decode()

    def _wait_for(self, requests: list[MPI.Request], limit: float | None) -> None:
        """Waits for all of them, with an eye on the servers."""
        idle = wire.Backoff()
        began = time.monotonic()
        gone: float | None = None
        waiting = _not_done(requests)
        while waiting:
            self._outbox.poll_sends()
            idle.wait()
            now = time.monotonic()
            if now - self._checked > 0.02:
                self._checked = now
                assert self.member.guest is not None
                if gone is None and self.member.guest.primary_lost():
                    gone = now
            if gone is not None and now - gone > LAST_WORDS:
                self._raise_lost("died")
            if limit is not None and now - began > limit:
                self._raise_lost(f"did not answer within {limit:g} s")
            waiting = _not_done(waiting)

    def _raise_lost(self, what: str) -> None:
        self.close()
        folder = self.settings.checkpoint_dir
        way = (f"start again with resume={str(folder)!r}" if folder is not None
               else "there is no checkpoint; pass checkpoint_dir and checkpoint_every")
        raise ServerLost(f"a parameter server {what}; {way}")


def _not_done(requests: list[MPI.Request]) -> list[MPI.Request]:
    return [request for request in requests if not request.Test()]

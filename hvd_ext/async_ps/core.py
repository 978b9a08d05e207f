"""``ParameterServer`` for any framework: the front ends add only how a model becomes flat."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from hvd_ext import kernels
from hvd_ext.async_ps.config import Schedule, ServerSettings
from hvd_ext.async_ps.model import Array, FlatModel
from hvd_ext.async_ps.report import Report
from hvd_ext.reducers.delay_compensation.momentum import AutoMomentum
from hvd_ext.reducers.delay_compensation.sequences import Recorded
from hvd_ext.reducers.delay_compensation.update_rules import AsyncRule, compile_kernel

Folder = str | os.PathLike[str]
T = TypeVar("T")


class ParameterServer:
    """Asynchronous SGD over MPI: some ranks serve the weights, no worker waits for another.

    Constructed by all ranks together. Then server ranks call :meth:`serve`; workers call
    :meth:`step` after each backward pass and :meth:`finish` at the end. At the end every rank's
    model holds the final weights.

    Args:
        model: the flat view of this rank's model.
        lr: a number above 0, or a function of the global number of updates; with
            ``updates_per_epoch`` a function of the epoch.
        rule: "asgd", "dc-asgd-c" or "dc-asgd-a" (DC-ASGD eq. 10 and section 6).
        lam: strength of the compensation; by default 0.04 for "dc-asgd-c", 2 for "dc-asgd-a".
        decay: m of MeanSquare in [0, 1).
        eps: added to MeanSquare, above 0.
        momentum: mu of Async-MSGD eq. 1.3 in [0, 1), "auto", or an ``AutoMomentum``.
        servers: number of server ranks, the first ones; each owns a slice of the parameters.
        comm: an mpi4py communicator; by default all ranks. It is duplicated, never used itself.
        updates_per_epoch, prefetch, worker_timeout, server_timeout, start_timeout,
        checkpoint_dir, checkpoint_every, keep, resume, reset_workers, broadcast, progress,
        total_updates: see :class:`hvd_ext.async_ps.config.ServerSettings`.

    Raises:
        ValueError, TypeError: a setting is out of range; there are fewer than two ranks or more
            servers than slices; ranks differ in parameters, starting weights or settings.
        TimeoutError: not all ranks came within ``start_timeout``.
        ImportError: mpi4py is not installed.
    """

    def __init__(self, model: FlatModel, *, lr: Schedule, rule: str = "dc-asgd-a",
                 lam: float | None = None, decay: float = 0.95, eps: float = 1e-7,
                 momentum: float | str | AutoMomentum = 0.0, servers: int = 1, comm: Any = None,
                 updates_per_epoch: int | None = None, prefetch: bool = False,
                 worker_timeout: float | None = 300.0, server_timeout: float | None = 300.0,
                 start_timeout: float = 120.0, checkpoint_dir: Folder | None = None,
                 checkpoint_every: int | None = None, keep: int = 2,
                 resume: Folder | None = None, reset_workers: bool = False,
                 broadcast: bool = False, progress: bool = True,
                 total_updates: int | None = None) -> None:
        settings = ServerSettings(
            rule=AsyncRule(name=rule, lam=lam, decay=decay, eps=eps), lr=lr,
            updates_per_epoch=updates_per_epoch, momentum=momentum, prefetch=prefetch,
            worker_timeout=worker_timeout, server_timeout=server_timeout,
            start_timeout=start_timeout,
            checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir),
            checkpoint_every=checkpoint_every, keep=keep,
            resume=None if resume is None else Path(resume), reset_workers=reset_workers,
            broadcast=broadcast, progress=progress, total_updates=total_updates,
        )
        try:
            # Only now: importing mpi4py starts MPI, which a program without it must not notice.
            from mpi4py import MPI
        except ImportError as error:
            raise ImportError(
                "ParameterServer needs mpi4py and an MPI library; pip install 'hvd-ext[mpi]'"
            ) from error
        from hvd_ext.async_ps.primary import Primary
        from hvd_ext.async_ps.registration import register_ranks
        from hvd_ext.async_ps.secondary import Secondary
        from hvd_ext.async_ps.worker import Worker

        kernels.kernel_choice()  # one that is not known is refused on workers too
        comm = MPI.COMM_WORLD if comm is None else comm
        if isinstance(servers, int) and comm.rank < servers:
            compile_kernel(model.dtype)  # before anybody waits for this server with a time limit
        self._buffer = model.new_buffer()
        self._buffer.take_weights()
        weights = self._buffer.read_entries()
        self._plan, member = register_ranks(comm, servers, model, weights, settings)
        rank = member.comm.rank
        self._comm = member.comm
        self._report: Report | None = None
        self._over = False
        self._primary = Primary(self._plan, member, settings, weights, model) if rank == 0 else None
        self._secondary = (
            Secondary(self._plan, member, settings, weights)
            if 0 < rank < servers else None
        )
        self._worker = Worker(self._plan, member, settings, model) if rank >= servers else None

    @property
    def is_server(self) -> bool:
        """Whether this rank serves."""
        return self._worker is None

    @property
    def worker(self) -> int:
        """This worker's number, from 0, for cutting the data.

        Raises:
            RuntimeError: this rank is a server.
        """
        return int(self._as_worker("worker").number)

    @property
    def workers(self) -> int:
        """Number of workers."""
        return self._plan.workers

    @property
    def updates(self) -> int:
        """The global number of updates, as this rank last heard."""
        if self._worker is not None:
            return self._worker.update
        return self._primary.books.update if self._primary is not None else 0

    @property
    def steps(self) -> int:
        """How many gradients this worker has pushed, before a resume too: where its data goes on.

        Raises:
            RuntimeError: this rank is a server.
        """
        return int(self._as_worker("steps").pushes)

    def serve(self) -> Report | None:
        """Server ranks: serve until all workers have finished or are left out.

        Returns:
            The report on rank 0, None on other servers.

        Raises:
            RuntimeError: this rank is a worker, or the run is over.
            ServerLost: another server died.
            ServerStopped: no worker is left, or the primary server stopped.
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM; a checkpoint has been written.
        """
        if not self.is_server:
            raise RuntimeError("serve() is for server ranks; workers call step() and finish()")
        if self._over:
            raise RuntimeError("serve() was already called; construct a new ParameterServer")
        self._over = True
        if self._primary is not None:
            self._report, whole = self._primary.serve()
        else:
            assert self._secondary is not None
            whole = self._secondary.serve()
        self._buffer.write_entries(whole)
        self._buffer.put_weights()
        return self._report

    def step(self) -> None:
        """Workers: push the gradients, pull the next weights into the model; one round trip.

        Raises:
            RuntimeError: this rank is a server, or finish() was called.
            ServerLost: a server died or does not answer.
            ServerStopped: the server was stopped.
            WorkerEvicted: this worker was silent for too long.
        """
        self._as_worker("step()").step()

    def finish(self) -> Report:
        """Workers: wait until all are done; the model then holds the final weights.

        Raises:
            As :meth:`step`.
        """
        self._report = self._as_worker("finish()").finish()
        self._over = True
        return self._report

    def snapshot(self) -> tuple[int, Array]:
        """Workers: one consistent state of all slices, between two updates.

        Returns:
            The number of updates it is after, and the weights, flat (numel,).
        """
        update, weights = self._as_worker("snapshot()").snapshot()
        return update, weights

    def evaluate(self, measure: Callable[[], T]) -> tuple[int, T]:
        """Workers: call ``measure()`` with one consistent state of all slices in the model.

        The others train on meanwhile, and afterwards this worker goes on from its own weights.

        Returns:
            The number of updates the state is after, and what ``measure`` returned.
        """
        worker = self._as_worker("evaluate()")
        update, weights = self.snapshot()
        self._buffer.write_entries(weights)
        self._buffer.put_weights()
        try:
            return update, measure()
        finally:
            worker.put_back()

    def ping(self) -> None:
        """Workers: say that this rank is alive, in pauses longer than ``worker_timeout``."""
        self._as_worker("ping()").ping()

    def report(self) -> Report:
        """Delays per worker, updates per second, bytes, faults; on workers after finish().

        Raises:
            RuntimeError: there is none on this rank yet.
        """
        if self._report is not None:
            return self._report
        if self._primary is not None:
            return self._primary.books.report()
        raise RuntimeError("report() is there on rank 0, and on workers after finish()")

    @property
    def recording(self) -> Recorded:
        """Rank 0: the delays of all updates, for ``hvd_ext.reducers.delay_compensation.engine.replay``.

        Raises:
            RuntimeError: this is not rank 0.
        """
        if self._primary is None:
            raise RuntimeError("the recording is on rank 0")
        return self._primary.books.recording

    def _as_worker(self, what: str) -> Any:
        if self._worker is None:
            raise RuntimeError(f"{what} is for workers; server ranks call serve()")
        if self._over and what != "worker":
            raise RuntimeError(f"{what} after finish(); construct a new ParameterServer")
        return self._worker

    def __enter__(self) -> ParameterServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """A worker's own error takes it out of the run in good order; the others go on."""
        if self._worker is not None and not self._over and isinstance(error, Exception):
            from hvd_ext.async_ps.errors import ServerLost, ServerStopped, WorkerEvicted

            if not isinstance(error, (WorkerEvicted, ServerLost, ServerStopped)):
                self._worker.leave_run()

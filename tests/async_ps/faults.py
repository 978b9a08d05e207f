"""Programs in which a rank dies, hangs, fails or is interrupted."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from hvd_ext.async_ps import wire
from tests.async_ps.runs import gradient, split, start, train

LAST = 2  # the worker things happen to, of three


def killed(options, steps):
    """The last worker is killed between two of its pushes."""

    def die(ps, batch, g):
        if ps.worker == LAST and batch == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    return train(options, steps, pause=0.002, hook=die)


def killed_with_half_a_push_sent(options, steps):
    """The last worker is killed when only the first of two servers has its slice."""

    def die(ps, batch, g):
        if ps.worker == LAST and batch == 5:
            worker = ps._worker
            made = wire.make_header(wire.PUSH, worker=worker.number, step=worker.pushes)
            worker._outbox.send_header(made, 0, wire.TO_SERVER)
            worker._outbox.send_header(made, 1, wire.TO_SERVER)
            worker.comm.Send(g[worker.plan.slices[0]], dest=0, tag=wire.GRADIENT)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)

    return train(options, steps, pause=0.002, hook=die)


def killed_within_a_large_push(options):
    """The last worker is killed while a push of 16 MB has not been taken by the server yet."""
    import numpy as np

    from hvd_ext.async_ps.numpy import ParameterServer

    parameters = [np.zeros(4_000_000, np.float32)]
    ps = ParameterServer(parameters, progress=False, **options)
    if ps.is_server:
        report = ps.serve()
        return report, np.unique(parameters[0])
    for batch in range(6):
        if ps.worker == LAST and batch == 3:
            worker = ps._worker
            made = wire.make_header(wire.PUSH, worker=worker.number, step=worker.pushes)
            worker._outbox.start_send(np.ones(4_000_000, np.float32), 0, wire.GRADIENT)
            worker._outbox.send_header(made, 0, wire.TO_SERVER)
            os.kill(os.getpid(), signal.SIGKILL)
        ps.step([np.ones(4_000_000, np.float32)])
    ps.finish()
    return None, np.unique(parameters[0])


def hung(options, steps):
    """The last worker stops dead without ending."""

    def stop(ps, batch, g):
        if ps.worker == LAST and batch == 5:
            os.kill(os.getpid(), signal.SIGSTOP)

    return train(options, steps, pause=0.002, hook=stop)


def late(options, steps):
    """The last worker sleeps for longer than the servers wait, then wants to go on."""

    def sleep(ps, batch, g):
        if ps.worker == LAST and batch == 5:
            time.sleep(2.5)

    return train(options, steps, pause=0.002, hook=sleep)


def failing(options, steps):
    """The last worker raises an error of its own inside ``with``."""
    from hvd_ext.async_ps.numpy import ParameterServer

    parameters = start()
    with ParameterServer(parameters, progress=False, **options) as ps:
        if ps.is_server:
            return ps.serve()
        for batch in range(steps):
            if ps.worker == LAST and batch == 5:
                raise ZeroDivisionError("a bug in the training loop")
            ps.step(split(gradient(parameters[2].repeat(2)[:1003], ps.worker, batch)))
        return ps.finish()


def all_killed(options, steps):
    """Every worker is killed."""

    def die(ps, batch, g):
        if batch == 5 + ps.worker:
            os.kill(os.getpid(), signal.SIGKILL)

    return train(options, steps, pause=0.002, hook=die)


def server_killed(options, steps, rank):
    """A server is killed by a worker, some time after the first checkpoint."""
    return server_signalled(options, steps, rank, signal.SIGKILL)


def server_signalled(options, steps, rank, number):
    """A server gets a signal from a worker, some time after the start."""
    from mpi4py import MPI

    pids = MPI.COMM_WORLD.allgather(os.getpid())

    def shoot(ps, batch, g):
        if ps.worker == 0 and batch == 30:
            os.kill(pids[rank], number)

    return train(options, steps, pause=0.002, hook=shoot)


def disk_full(options, steps, rank):
    """A server cannot write its second checkpoint."""
    import errno

    from mpi4py import MPI

    from hvd_ext.checkpoint import files

    write, calls = files.write_atomically, []

    def fail(path, save):
        calls.append(path)
        if len(calls) > (3 if rank == 0 else 1):  # rank 0 writes the recording and the manifest too
            def save(file):
                file.write(b"half")
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, save)

    if MPI.COMM_WORLD.rank == rank:
        files.write_atomically = fail
    return train(options, steps, pause=0.002)


def endless(options, flag):
    """Trains until it is interrupted; writes ``flag`` once it is under way."""

    def tell(ps, batch, g):
        if batch == 20:
            Path(flag).touch()

    return train(options, 10**9, pause=0.002, hook=tell)


def trained(options, steps):
    """An ordinary run."""
    return train(options, steps, pause=0.001)


def failing_schedule(options, steps):
    """The learning rate's function fails on the server."""
    return train({**options, "lr": _bad_lr}, steps)


def _bad_lr(update):
    return 0.02 if update < 20 else -1.0


def one_rank_stays_away():
    """Three ranks construct a server, the fourth never does."""
    from mpi4py import MPI

    from hvd_ext.async_ps.numpy import ParameterServer

    if MPI.COMM_WORLD.rank == 3:
        time.sleep(2.5)
        return
    ParameterServer(start(), lr=0.1, start_timeout=2.0)


def struck(options, steps, rank, seconds, number):
    """Rank ``rank`` sends itself a signal some seconds after all have met; none does where it is -1."""
    from mpi4py import MPI

    from hvd_ext.async_ps import numpy

    class Struck(numpy.ParameterServer):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()

    if rank == MPI.COMM_WORLD.rank:
        numpy.ParameterServer = Struck
    return train(options, steps, pause=0.004)

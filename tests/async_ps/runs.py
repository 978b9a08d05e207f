"""What the ranks of the multi-process tests do; a noisy quadratic stands for a model."""

from __future__ import annotations

import time

import numpy as np

N = 1003
SHAPES = [(17, 23), (23,), (589,)]
SCALE = np.linspace(0.5, 2.0, N)


def start(dtype=np.float32, seed=0):
    flat = np.random.default_rng(seed).normal(size=N).astype(dtype)
    cuts = np.cumsum([int(np.prod(s)) for s in SHAPES])[:-1]
    parts = np.split(flat, cuts)
    return [part.reshape(shape).copy() for part, shape in zip(parts, SHAPES, strict=True)]


def flat(arrays):
    return np.concatenate([array.reshape(-1) for array in arrays])


def gradient(w, worker, batch):
    """Of the mini-batch ``batch`` of ``worker`` at flat weights (N,), in w's dtype."""
    noise = np.random.default_rng([worker, batch]).normal(size=w.shape)
    return (w * SCALE + 0.3 * noise).astype(w.dtype)


def split(w):
    cuts = np.cumsum([int(np.prod(s)) for s in SHAPES])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(w, cuts), SHAPES, strict=True)]


def train(options, steps, *, dtype="float32", pause=0.0, slow=None, size=None, hook=None,
          hook_args=()):
    """A whole run; server 0 returns its report, recording and weights, workers their weights.

    ``slow``: a worker whose pause is five times as long. ``hook(ps, batch, *hook_args)`` is called
    on workers before each push and may return another gradient. With ``size`` only the first
    ranks take part; the others return None.
    """
    from mpi4py import MPI

    from hvd_ext.async_ps.numpy import ParameterServer

    if size is not None:
        part = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank < size)
        if MPI.COMM_WORLD.rank >= size:
            return None
        options = {**options, "comm": part}
    parameters = start(np.dtype(dtype))
    ps = ParameterServer(parameters, progress=False, **options)
    if ps.is_server:
        report = ps.serve()
        told = {"weights": flat(parameters)}
        if report is not None:
            told.update(report=report, recording=ps.recording)
        return told
    while ps.steps < steps:
        batch = ps.steps
        time.sleep(pause * (5 if ps.worker == slow else 1))
        g = gradient(flat(parameters), ps.worker, batch)
        if hook is not None:
            changed = hook(ps, batch, g, *hook_args)
            g = g if changed is None else changed
        ps.step(split(g))
    report = ps.finish()
    return {"weights": flat(parameters), "report": report, "updates": ps.updates}


def halved(epoch):
    """A learning rate by epoch."""
    return 0.02 * 0.5 ** int(epoch)


def train_paused(options, steps):
    """Workers that compute for some milliseconds."""
    return train(options, steps, pause=0.003)


def train_some(options, steps, size, dtype):
    """Only the first ``size`` ranks take part."""
    return train(options, steps, size=size, dtype=dtype)


def refused(options, size):
    """The error of this rank when it constructs the server; None on ranks that take no part."""
    from mpi4py import MPI

    from hvd_ext.async_ps.numpy import ParameterServer

    part = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank < size)
    if MPI.COMM_WORLD.rank >= size:
        return "holds the checkpoints of another run; resume from it, or write to an empty folder"
    try:
        ParameterServer(start(), progress=False, comm=part, **options)
    except ValueError as error:
        return str(error)
    return "no error"


def train_with_nan(options, steps):
    """Worker 0 sends a NaN and an infinity."""

    def spoil(ps, batch, g):
        if ps.worker == 0 and batch in (3, 7):
            g[-1] = np.nan if batch == 3 else np.inf  # in the last server's slice only
        return g

    return train(options, steps, hook=spoil)


def parameters_of(ps):
    """What is in the model now (N,)."""
    return flat(ps._model.parameters).copy()


def train_with_snapshots(options, steps):
    """Workers look at the state three times."""
    taken = []

    def look(ps, batch, g):
        if batch % 10 == 5:
            taken.append(ps.snapshot())
            own = parameters_of(ps)
            taken.append(ps.evaluate(lambda: parameters_of(ps)))
            np.testing.assert_array_equal(parameters_of(ps), own)

    result = train(options, steps, pause=0.001, hook=look)
    return {**result, "snapshots": taken}


def train_from_different_starts(options, steps):
    """Each rank builds other weights; rank 0's count."""
    from mpi4py import MPI

    from hvd_ext.async_ps.numpy import ParameterServer

    parameters = start(seed=MPI.COMM_WORLD.rank)
    ps = ParameterServer(parameters, progress=False, broadcast=True, **options)
    if ps.is_server:
        report = ps.serve()
        return {"weights": flat(parameters), "report": report, "recording": ps.recording}
    for batch in range(steps):
        ps.step(split(gradient(flat(parameters), ps.worker, batch)))
    ps.finish()
    return {"weights": flat(parameters)}


def disagree(case):
    """The error of this rank."""
    from mpi4py import MPI

    from hvd_ext.async_ps.numpy import ParameterServer

    odd = MPI.COMM_WORLD.rank == 3
    parameters = start()
    options = {"lr": 0.1, "progress": False}
    if case == "shapes" and odd:
        parameters[1] = parameters[1].reshape(1, 23)
    if case == "dtype" and odd:
        parameters = start(np.float64)
    if case == "weights" and odd:
        parameters[2][5] += 1
    if case == "settings" and odd:
        options["lr"] = 0.2
    if case == "servers":
        options["servers"] = 4
    if case == "slices":
        options["servers"] = 3
        parameters = [np.zeros(2, np.float32)]
    if case == "resume":
        options["resume"] = "/nowhere"
    try:
        ParameterServer(parameters, **options)
    except ValueError as error:
        return str(error)
    return None


def wrong_calls():
    """Calls of the other role."""
    from hvd_ext.async_ps.numpy import ParameterServer

    parameters = start()
    ps = ParameterServer(parameters, lr=0.1, progress=False)
    said = ""
    try:
        if ps.is_server:
            ps.step(parameters)
        else:
            ps.serve()
    except RuntimeError as error:
        said = str(error)
    if ps.is_server:
        ps.serve()
    else:
        ps.finish()
    return said

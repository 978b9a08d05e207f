"""Links and work as they are where the ranks run now: ``hvd-ext plan --measure``.

Every rank calls :func:`measure_cluster`. Collectives go through Horovod where it is installed, else through
mpi4py.
What is computed is timed on all ranks at once, so that ranks which share cores are measured sharing them.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvd_ext import checks
from hvd_ext.planning.backends import Backend, find_voice
from hvd_ext.planning.compute_benchmark import time_compute
from hvd_ext.planning.compute_costs import ComputeCosts
from hvd_ext.planning.links import Cluster, Link
from hvd_ext.planning.messages import collective_traffic

MESSAGE_BYTES = (2**16, 2**19, 2**21, 2**23)  # bytes that move through a rank, about
TIMED_CALLS = 5
MAX_SECONDS_PER_SIZE = 4.0  # seconds for one size of one collective, after the first two
SMALL_MESSAGES = 30  # collectives of a few bytes


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        cluster: links by collective.
        work: what computing takes on all ranks at once.
        points: by collective, (bytes handed over, seconds) of each size.
        first: whether this is rank 0.
    """

    cluster: Cluster
    work: ComputeCosts
    points: Mapping[str, list[tuple[int, float]]]
    first: bool


def measure_cluster(numel: int, ratio: float = 0.01, *, rank: int = 4,
                    voice: Backend | None = None) -> Measured:
    """Measure links and work; called on all ranks, all of which get the same figures.

    Args:
        numel: parameters of the model that is planned for; no message is larger than its gradient.
        ratio: TopK's kept fraction.
        rank: of PowerSGD.
        voice: the collectives; unless given Horovod's, or mpi4py's without Horovod.

    Raises:
        ValueError: a single rank, or ranks that are not evenly spread over the hosts.
        ImportError: neither is installed.
    """
    checks.check_int("params", numel, low=1)
    voice = voice or find_voice()
    if voice.size == 1:
        raise ValueError("one rank has no link to measure; start two or more")
    local = {int(one) for one in voice.gather_values([float(voice.local_size)]).ravel()}
    if len(local) > 1:
        raise ValueError(f"the hosts have {sorted(local)} ranks; start as many on each of them")
    per_host = local.pop()
    shape = Cluster(voice.size // per_host, Link(1.0), per_host)
    hop = _measure_hop(voice)
    small = _time_collective(voice, voice.prepare_collective("allreduce", 4), SMALL_MESSAGES)
    ring = collective_traffic("allreduce", 4, shape)
    fixed = 0.0 if hop is None else max(0.0, small - hop * (ring.outer_hops + ring.inner_hops))
    points = {name: _measure_points(voice, name, numel)
              for name in ("allreduce", "allreduce_half", "allgather", "alltoall", "broadcast")}
    links = {name: fit_link(name, found, shape, fixed) for name, found in points.items()}
    plain = links["allreduce"]
    cluster = Cluster(shape.hosts, plain, per_host, plain, fixed_us=1e6 * fixed, measured=links)
    return Measured(cluster, _measure_compute(voice, numel, ratio, rank), points, voice.rank == 0)


def fit_link(collective: str, points: Sequence[tuple[int, float]], cluster: Cluster, fixed: float) -> Link:
    """The link that a collective sees, from ``seconds = fixed + hops latency + bytes / speed``.

    The speed is that of least squares, to which large messages count most: links that are shaped let short
    ones pass at once. The latency is then that of least relative errors, to which small ones count as much.

    Args:
        points: (bytes handed over, seconds).
        fixed: seconds that are no hop's.
    """
    what = [collective_traffic(collective, size, cluster) for size, _ in points]
    taken = np.array([max(one.outer, one.inner) for one in what])
    seconds = np.array([second for _, second in points])
    rows = np.stack([np.ones_like(taken), taken], axis=1)
    per_byte = float(np.linalg.lstsq(rows, seconds, rcond=None)[0][1])
    if per_byte <= 0:  # noise: small messages took as long as large ones
        per_byte = float(seconds[-1] / taken[-1])
    begin = np.average(seconds - per_byte * taken, weights=seconds ** -2.0)
    hops = what[0].outer_hops + what[0].inner_hops
    return Link(8e-9 / per_byte, 1e6 * max(0.0, float(begin) - fixed) / hops)


def _measure_points(voice: Backend, collective: str, numel: int) -> list[tuple[int, float]]:
    """Bytes handed over, and seconds, of some sizes up to the model's."""
    share = voice.size if collective == "allgather" else 1
    largest = numel * (2 if collective == "allreduce_half" else 4)
    found = []
    for total in sorted({min(size, largest) for size in MESSAGE_BYTES}):
        nbytes = max(4 * voice.size, total // share)
        found.append((nbytes,
                      _time_collective(voice, voice.prepare_collective(collective, nbytes), TIMED_CALLS)))
    return found


def _time_collective(voice: Backend, call: Callable[[], Any], repeats: int) -> float:
    """The median over calls of the slowest rank's seconds; the first calls are for memory and plans."""
    taken: list[float] = []
    for number in range(repeats + 2):
        voice.wait_for_all()
        began = time.perf_counter()
        call()
        slowest = float(voice.gather_values([time.perf_counter() - began]).max())  # the same on every rank
        if number >= 2:
            taken.append(slowest)
        if taken and sum(taken) > MAX_SECONDS_PER_SIZE:
            break
    return statistics.median(taken)


def _measure_hop(voice: Backend) -> float | None:
    """Seconds of a hop to the next rank in a ring by MPI; None without mpi4py, or for ranks without MPI."""
    if importlib.util.find_spec("mpi4py") is None:
        return None
    world = importlib.import_module("mpi4py.MPI").COMM_WORLD
    if world.Get_size() != voice.size:  # Gloo
        return None
    here, size = world.Get_rank(), world.Get_size()
    out, back = np.zeros(1), np.zeros(1)

    def ring() -> None:
        for _ in range(10):
            world.Sendrecv(out, dest=(here + 1) % size, recvbuf=back, source=(here - 1) % size)

    return _time_collective(voice, ring, TIMED_CALLS) / 10


def _measure_compute(voice: Backend, numel: int, ratio: float, rank: int) -> ComputeCosts:
    """The slowest rank's figures, all ranks at work at once."""
    mine = time_compute(numel, ratio, rank, voice.framework, voice.wait_for_all)
    names = list(mine.to_dict())
    slowest = voice.gather_values(list(mine.to_dict().values())).max(axis=0)
    return ComputeCosts(**dict(zip(names, map(float, slowest), strict=True)))

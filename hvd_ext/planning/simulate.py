"""The schedule of a step, event by event: forward, backward, exchanges one after another on the link.

Horovod runs one collective at a time, in the order in which they became ready on all ranks, and puts
together what waits of one kind. So the link is one queue, and each rank one thread that computes and
waits. All ranks are alike but for their stragglers' factors: a collective begins when the slowest is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_ext import checks
from hvd_ext.planning.exchange import Exchange, Message
from hvd_ext.planning.links import Cluster
from hvd_ext.planning.messages import collective_seconds
from hvd_ext.planning.stragglers import Stragglers
from hvd_ext.planning.workload import Workload
from hvd_ext.reducers.topk.config import HOROVOD_FUSION_BYTES

STEPS = 200  # drawn of each way, where stragglers make them differ
POINTS = 17  # factors at which the schedule is run; between them it is interpolated


@dataclass(frozen=True)
class Result:
    """What a simulated step takes.

    Attributes:
        step: mean seconds of a step.
        slowest: the 95th percentile; without stragglers the same. With a late exchange, of the mean
            step over all ranks.
        exchange: seconds of a step without compute.
    """

    step: float
    slowest: float
    exchange: float


class Queue:
    """The link: one collective at a time.

    Args:
        cluster: what it connects.
        busy: seconds for which it is busy at the beginning.
    """

    def __init__(self, cluster: Cluster, busy: float = 0.0) -> None:
        self.cluster = cluster
        self.free = busy

    def serve_messages(self, messages: Sequence[Message], ready: Sequence[float]) -> list[float]:
        """When each message has arrived, given when each was ready on all ranks."""
        arrived: list[float] = []
        first = 0
        while first < len(messages):
            begin, kind = max(self.free, ready[first]), messages[first].collective
            size, last = messages[first].size, first + 1
            while (last < len(messages) and messages[first].fuses and messages[last].fuses
                   and messages[last].collective == kind and ready[last] <= begin
                   and size + messages[last].size <= HOROVOD_FUSION_BYTES):
                size += messages[last].size
                last += 1
            self.free = begin + collective_seconds(kind, size, self.cluster)
            arrived += [self.free] * (last - first)
            first = last
        return arrived


def after_backward(exchange: Exchange, workload: Workload, factor: float) -> tuple[float, list[float]]:
    """When the backward pass is over, and when each message of the first stage is ready."""
    messages = exchange.stages[0].messages
    now, backward = factor * workload.compute * workload.forward, workload.compute * (1 - workload.forward)
    ready: list[float] = []
    for place, numel in enumerate(reversed(workload.sizes)):
        now += factor * backward * numel / workload.numel
        while len(ready) < len(messages) and messages[len(ready)].needs <= place:
            now += messages[len(ready)].before
            ready.append(now)
    return now, ready


def sent_at(messages: Sequence[Message], now: float) -> tuple[float, list[float]]:
    """The same for messages that are sent one after another from ``now`` on."""
    ready = []
    for message in messages:
        now += message.before
        ready.append(now)
    return now, ready


def received_time(messages: Sequence[Message], arrived: Sequence[float], now: float) -> float:
    """When a rank that waits from ``now`` on has dealt with all messages, in their order."""
    for message, time in zip(messages, arrived, strict=True):
        now = max(now, time) + message.after
    return now


def rest_of_step(exchange: Exchange, queue: Queue, now: float) -> float:
    """From the arrival of the first stage to the end of the step."""
    for stage in exchange.stages[1:]:
        now, ready = sent_at(stage.messages, now + stage.work)
        now = received_time(stage.messages, queue.serve_messages(stage.messages, ready), now)
    return now + exchange.end


def synchronous_step(exchange: Exchange, workload: Workload, cluster: Cluster, factor: float = 1.0) -> float:
    """Seconds of a step that waits for its own exchange.

    Args:
        factor: by which the slowest rank's compute is longer.
    """
    queue = Queue(cluster)
    beside = queue.serve_messages(exchange.beside, [0.0] * len(exchange.beside))
    messages = exchange.stages[0].messages
    now, ready = after_backward(exchange, workload, factor)
    now = received_time(messages, queue.serve_messages(messages, ready), now)
    now = received_time(exchange.beside, beside, now)
    refresh = sum(collective_seconds(one.collective, one.size, cluster) for one in exchange.refresh)
    return rest_of_step(exchange, queue, now) + refresh / exchange.update_freq


def beside_backward(exchange: Exchange, queue: Queue, arrived: Sequence[float],
                    begin: float) -> tuple[float, float]:
    """Further stages while a backward pass runs: seconds that a rank computes for them, and their end.

    Args:
        arrived: when the first stage had.
        begin: of the backward pass, on the slowest rank.
    """
    now, work = begin, 0.0
    for stage in exchange.stages[1:]:
        now = max(now, *arrived)
        through, ready = sent_at(stage.messages, now + stage.work)
        work += through - now
        arrived, now = queue.serve_messages(stage.messages, ready), through
    return work, arrived[-1]


def delayed_steps(exchange: Exchange, workload: Workload, cluster: Cluster,
                  factors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Seconds of each step that waits for the exchange of the step before.

    A rank goes on as soon as that has arrived, however slow others are at their own step; only an
    exchange with further stages makes all wait for the slowest, or for the beginning of its backward pass.

    Args:
        factors: (steps, M).

    Returns:
        (steps - 1,): from one step to the next, the mean over the ranks.
    """
    messages = exchange.stages[0].messages
    gone = np.zeros(factors.shape[1])  # when each rank was through with its step
    arrived: list[float] | None = None
    ends = []
    queue = Queue(cluster)
    for row in factors:
        backward = float((gone + row * workload.compute * workload.forward).max())
        gone = gone + row * workload.compute
        if arrived is not None:
            for message, time in zip(messages, arrived, strict=True):
                gone = np.maximum(gone, time) + message.after
            if exchange.goes_on:
                work, end = beside_backward(exchange, queue, arrived, backward)
                gone = np.maximum(gone + work, end)
            elif len(exchange.stages) > 1:
                gone = np.full_like(gone, rest_of_step(exchange, queue, float(gone.max())) - exchange.end)
        begin = float(gone.max())
        through, ready = sent_at(messages, begin)
        arrived = queue.serve_messages(messages, ready)
        gone = gone + (through - begin) + exchange.end
        ends.append(float(gone.mean()))
    found: npt.NDArray[Any] = np.diff(ends)
    return found


def simulate_steps(exchange: Exchange, workload: Workload, cluster: Cluster,
                   stragglers: Stragglers | None = None,
                   *, steps: int = STEPS, seed: int = 0) -> Result:
    """Seconds of a step, by a Monte Carlo simulation where ranks straggle.

    Args:
        exchange: one of ``methods.py``.
        stragglers: how ranks differ; None for not at all.
        steps: how many to draw, at least 2.
        seed: of the draws.

    Raises:
        TypeError, ValueError: fewer than two steps, or a negative seed.
    """
    checks.check_int("steps", steps, low=2)
    checks.check_int("seed", seed, low=0)
    stragglers = stragglers or Stragglers()
    still = Workload(workload.shapes, 0.0, workload.forward)
    ranks = cluster.ranks
    if exchange.delayed:
        alone = float(delayed_steps(exchange, still, cluster, np.ones((4, ranks)))[-1])
        drawn = stragglers.draw_factors(np.random.default_rng(seed), steps + 2, ranks)
        taken = delayed_steps(exchange, workload, cluster, drawn)[1:]  # the first step waits for nothing
        return Result(float(taken.mean()), float(np.quantile(taken, 0.95)), alone)
    alone = synchronous_step(exchange, still, cluster)
    if stragglers.amount == 0 or workload.compute == 0:
        step = synchronous_step(exchange, workload, cluster)
        return Result(step, step, alone)
    slowest = stragglers.draw_factors(np.random.default_rng(seed), steps, ranks).max(axis=1)
    points = np.linspace(slowest.min(), slowest.max(), POINTS)
    at = [synchronous_step(exchange, workload, cluster, float(one)) for one in points]
    taken = np.interp(slowest, points, at)
    return Result(float(taken.mean()), float(np.quantile(taken, 0.95)), alone)

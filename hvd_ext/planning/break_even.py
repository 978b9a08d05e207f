"""Where TopK breaks even with an allreduce, and what each server keeps and sends."""

from __future__ import annotations

import math

from hvd_ext.planning.links import Cluster
from hvd_ext.planning.methods import FLOAT, Scenario, plan_dense, plan_topk
from hvd_ext.planning.simulate import synchronous_step
from hvd_ext.planning.workload import Workload
from hvd_ext.reducers.topk.wire import VALUE_BYTES

AGAINST = {"dense": 4, "fp16": 2}
"""What TopK is compared with, and bytes of its elements."""
SPEEDS = (1e-4, 1e6)  # Gbit/s: slower and faster than any link


def break_even_ranks(ratio: float, itemsize: int, values: str = "float32") -> int:
    """The fewest ranks at which TopK moves at least the bytes of an allreduce of ``itemsize``.

    ``(M-1) ratio (4 + v) = 2 (M-1)/M itemsize``; 1 / ratio against float32.
    """
    return math.ceil(2 * itemsize / (ratio * (4 + VALUE_BYTES[values])) - 1e-9)


def break_even_ratio(ranks: int, itemsize: int, values: str = "float32") -> float:
    """The ratio at which TopK moves the bytes of an allreduce of ``itemsize``, at most 1."""
    return min(1.0, 2 * itemsize / (ranks * (4 + VALUE_BYTES[values])))


def break_even_gbps(setup: Scenario, cluster: Cluster, against: str) -> float:
    """The speed of the link between hosts above which an exchange by TopK takes longer than ``against``.

    Of a single host that of the link inside. 0 where TopK never pays, infinite where it always does.
    """
    still = Workload(setup.workload.shapes)
    ways = plan_topk(setup), plan_dense(setup, half=against == "fp16")

    def pays(gbps: float) -> bool:
        there = cluster.at_speed(gbps)
        ours, theirs = (synchronous_step(way, still, there) for way in ways)
        return ours < theirs

    low, high = map(math.log, SPEEDS)
    if not pays(SPEEDS[0]):
        return 0.0
    if pays(SPEEDS[1]):
        return math.inf
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if pays(math.exp(middle)) else (low, middle)
    return math.exp(low)


def moment_elements(numel: int, ranks: int, server: str, moments: int) -> int:
    """Elements of optimizer state on the fullest rank, when parameters divide evenly."""
    return moments * (math.ceil(numel / ranks) if server == "sharded" else numel)


def weight_bytes(numel: int, ranks: int, server: str) -> int:
    """Bytes of new weights into a rank that owns its share, a step; the owner sends as many on."""
    if server == "replicated" or ranks == 1:
        return 0
    return FLOAT * (numel if server == "rank0" else numel * (ranks - 1) // ranks)

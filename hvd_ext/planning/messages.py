"""Bytes and hops of each collective, and their time: the alpha-beta model on bandwidth-optimal algorithms.

``size`` is what one rank hands over: the tensor of an allreduce, a reduce-scatter or a broadcast, a rank's
own part of an allgather, all that a rank sends in an alltoall, its own part included.

| collective | bytes in (and out) of a rank | hops |
|---|---|---|
| allreduce | 2 (M-1)/M size | 2 (M-1) |
| reduce_scatter | (M-1)/M size | M-1 |
| allgather | (M-1) size | M-1 |
| alltoall | (M-1)/M size | M-1 |
| broadcast | size | M-1, as a pipelined chain |

A ring passes each host's link once in either direction, however many ranks the host has. An alltoall
does not: all L ranks of a host send at once through its link, L (M-L)/M size.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvd_ext import checks
from hvd_ext.planning.links import COLLECTIVES, Cluster

_RINGS = {"allreduce": 2, "allreduce_half": 2, "reduce_scatter": 1}  # times around


@dataclass(frozen=True)
class Traffic:
    """What one collective moves.

    Attributes:
        rank: bytes in (and out) of each rank.
        outer: bytes in (and out) of each host's link to the others.
        inner: bytes in (and out) of each rank on the link inside of its host.
        outer_hops: hops between hosts, one after another.
        inner_hops: hops inside of a host.
        in_turn: the inner part is before or after the outer one, not at the same time.
    """

    rank: float
    outer: float
    inner: float
    outer_hops: int
    inner_hops: int
    in_turn: bool = False


def collective_traffic(collective: str, size: float, cluster: Cluster) -> Traffic:
    """What a collective moves on a cluster; nothing on a single rank.

    Raises:
        ValueError: no such collective.
    """
    checks.check_choice("collective", collective, COLLECTIVES)
    ranks, hosts, local = cluster.ranks, cluster.hosts, cluster.per_host
    times = _RINGS.get(collective, 1)
    hops = times * (ranks - 1)
    if collective == "allgather":
        rank, away, within = (ranks - 1) * size, (ranks - local) * size, (ranks - 1) * size
    elif collective == "broadcast":
        rank = away = within = size if ranks > 1 else 0.0
    else:
        rank = times * (ranks - 1) * size / ranks
        away, within = times * (hosts - 1) * size / hosts, times * (local - 1) * size / local
    if collective == "alltoall":
        away, within = local * (ranks - local) * size / ranks, (local - 1) * size / ranks
    if hosts == 1:
        return Traffic(rank, 0.0, rank, 0, hops)
    if local == 1:
        return Traffic(rank, rank, 0.0, hops, 0)
    if cluster.hierarchical:
        return Traffic(rank, away, within, times * (hosts - 1), times * (local - 1), in_turn=True)
    if collective == "alltoall":
        return Traffic(rank, away, within, ranks - local, local - 1)
    return Traffic(rank, rank, rank, hops, 0)  # every step of the ring waits for a hop between hosts


def collective_seconds(collective: str, size: float, cluster: Cluster) -> float:
    """How long a collective takes, once every rank has handed over its part."""
    what = collective_traffic(collective, size, cluster)
    if cluster.ranks == 1:
        return 0.0
    fixed = cluster.fixed_us * 1e-6
    link = cluster.measured.get(collective) or (
        cluster.measured.get("allreduce") if collective in _RINGS else None)
    if link is not None:
        return fixed + link.transfer_seconds(max(what.outer, what.inner), what.outer_hops + what.inner_hops)
    outer = cluster.outer.transfer_seconds(what.outer, what.outer_hops)
    inner = cluster.inner.transfer_seconds(what.inner, what.inner_hops)
    return fixed + (outer + inner if what.in_turn else max(outer, inner))

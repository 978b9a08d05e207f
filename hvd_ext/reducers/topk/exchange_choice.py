"""Which exchange TopK takes where it may choose, by the cost model of ``hvd_ext.planning``."""

from __future__ import annotations

from hvd_ext.planning.links import Cluster, Link
from hvd_ext.planning.messages import collective_seconds
from hvd_ext.reducers.topk import allreduce
from hvd_ext.reducers.topk.wire import Layout

ASSUMED = Link(10.0)
"""The link that "auto" goes by, the same on every rank."""


def select_exchange(exchange: str, ranks: int, k: int, values: str, link: Link | None = None) -> str:
    """The exchange that ``exchange=`` of TopK means for a bucket: "allgather" or "sparse_allreduce".

    "auto" compares bytes and hops over ``link`` (10 Gbit/s); the answer is the same on every rank.
    """
    if ranks == 1 or exchange == "allgather":
        return "allgather"
    if exchange == "sparse_allreduce":
        return exchange
    cluster = Cluster.one_rank_per_host(ranks, link or ASSUMED)
    entries = 4 * Layout(k, values).words
    gather = collective_seconds("allgather", entries, cluster)
    told = collective_seconds("allgather", 8 * allreduce.WORDS, cluster)
    reduce = collective_seconds("alltoall", entries,
                                cluster) + told + collective_seconds("allgather", entries / ranks, cluster)
    return "sparse_allreduce" if reduce < gather else "allgather"

"""Which exchange TopK takes where it may choose, by the cost model of ``hvd_ext.planning``."""

from __future__ import annotations

from hvd_ext.planning.links import Cluster, Link
from hvd_ext.planning.messages import seconds
from hvd_ext.topk import sparse
from hvd_ext.topk.wire import Layout

ASSUMED = Link(10.0)
"""The link that "auto" goes by, the same on every rank."""


def chosen_exchange(exchange: str, ranks: int, k: int, values: str, link: Link | None = None) -> str:
    """The exchange that ``exchange=`` of TopK means for a bucket: "allgather" or "sparse_allreduce".

    "auto" compares bytes and hops over ``link`` (10 Gbit/s); the answer is the same on every rank.
    """
    if ranks == 1 or exchange == "allgather":
        return "allgather"
    if exchange == "sparse_allreduce":
        return exchange
    cluster = Cluster.flat(ranks, link or ASSUMED)
    entries = 4 * Layout(k, values).words
    gather = seconds("allgather", entries, cluster)
    told = seconds("allgather", 8 * sparse.WORDS, cluster)
    reduce = seconds("alltoall", entries, cluster) + told + seconds("allgather", entries / ranks, cluster)
    return "sparse_allreduce" if reduce < gather else "allgather"

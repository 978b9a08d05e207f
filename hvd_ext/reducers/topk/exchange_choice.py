"""The exchange that TopK takes where it may choose, by bytes and hops on an assumed link."""

from __future__ import annotations

from hvd_ext.reducers.topk import allreduce
from hvd_ext.reducers.topk.wire import Layout

GBPS, LATENCY_US = 10.0, 20.0
"""The link between hosts of one rank each that "auto" goes by, the same on every rank."""


def exchange_seconds(ranks: int, k: int, values: str, *, gbps: float = GBPS,
                     latency_us: float = LATENCY_US) -> dict[str, float]:
    """Seconds that each exchange of k entries a rank takes on the wire, by the alpha-beta model.

    An allgather receives what M-1 others send. A sparse allreduce sends (M-1)/M of a rank's entries to their
    owners, gathers a few numbers, and gathers the owners' entries.

    Args:
        ranks: M.
        k: entries that each rank sends.
        values: dtype of the values on the wire.
        gbps: gigabits per second of each rank's link, each way.
        latency_us: microseconds of one hop.
    """
    entries = 4 * Layout(k, values).words  # bytes
    hops = (ranks - 1) * latency_us * 1e-6
    each = (ranks - 1) / (gbps * 1e9 / 8)  # seconds for each byte of a rank that all others receive
    return {"allgather": entries * each + hops,
            "sparse_allreduce": (2 * entries / ranks + 8 * allreduce.WORDS) * each + 3 * hops}


def select_exchange(exchange: str, ranks: int, k: int, values: str) -> str:
    """The exchange that ``exchange=`` of TopK means for a bucket: "allgather" or "sparse_allreduce".

    "auto" takes the quicker one by :func:`exchange_seconds`; the answer is the same on every rank.
    """
    if ranks == 1 or exchange == "allgather":
        return "allgather"
    if exchange == "sparse_allreduce":
        return exchange
    seconds = exchange_seconds(ranks, k, values)
    return "sparse_allreduce" if seconds["sparse_allreduce"] < seconds["allgather"] else "allgather"

"""When TopK pays off: bytes and seconds of a step's exchange, dense, in half precision, and sparse.

Bandwidth-optimal ring algorithms. An allreduce moves ``2 (M-1)/M`` times the gradient in and out of
each rank, whatever M; an allgather moves the messages of the M - 1 others: it grows with M. With 8
bytes an entry against 4, TopK moves as much as the dense allreduce at M = 1 / ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hvd_ext import checks
from hvd_ext.topk import sparse
from hvd_ext.topk.config import TopK, checked_ratio, keep_count
from hvd_ext.topk.wire import VALUE_BYTES, Layout

SPARSE = "topk sparse_allreduce"
DENSE_BYTES = 4
HALF_BYTES = 2


@dataclass(frozen=True)
class Link:
    """How ranks are connected, and what choosing costs.

    Args:
        gbps: gigabits per second, each way, of each rank.
        latency_us: microseconds of one hop.
        select_ns: nanoseconds an element that compensation, selection and adding up take; the
            default is what ``benchmarks/topk_exchange.py`` measures on one CPU core.
    """

    gbps: float
    latency_us: float = 20.0
    select_ns: float = 6.0

    def __post_init__(self) -> None:
        checks.number("gbps", self.gbps, low=0.0, open_low=True,
                      hint="10 Gbit/s Ethernet is gbps=10")
        checks.number("latency_us", self.latency_us, low=0.0)
        checks.number("select_ns", self.select_ns, low=0.0)

    def seconds(self, moved: float, hops: int) -> float:
        """Time to move so many bytes in so many hops."""
        return moved / (self.gbps * 1e9 / 8) + hops * self.latency_us * 1e-6


@dataclass(frozen=True)
class Cost:
    """One way to bring gradients together: bytes in (and out) of each rank, seconds of a step."""

    name: str
    moved: int
    seconds: float


def check_size(numel: int, ranks: int) -> None:
    """Refuse what is no model or no cluster.

    Raises:
        TypeError, ValueError: fewer than one parameter or rank.
    """
    checks.whole("params", numel, low=1)
    checks.whole("ranks", ranks, low=1)


def ring_bytes(numel: int, ranks: int, itemsize: int) -> int:
    """In and out of each rank in a ring allreduce."""
    return 2 * (ranks - 1) * numel * itemsize // ranks


def topk_bytes(numel: int, ranks: int, ratio: float, values: str = "float32") -> int:
    """In and out of each rank when messages are allgathered."""
    return (ranks - 1) * 4 * Layout(keep_count(numel, ratio), values).words


def sparse_bytes(numel: int, ranks: int, ratio: float, values: str = "float32") -> int:
    """In and out of each rank in a sparse allreduce: k entries to their owners, about k back."""
    entries = 4 * Layout(keep_count(numel, ratio), values).words
    told = (ranks - 1) * 8 * sparse.WORDS
    return 2 * (ranks - 1) * entries // ranks + told


def chosen_exchange(exchange: str, ranks: int, k: int, values: str, link: Link | None = None) -> str:
    """The exchange that ``exchange=`` of TopK means for a bucket: "allgather" or "sparse_allreduce".

    "auto" compares bytes and hops over ``link`` (10 Gbit/s); the answer is the same on every rank.
    """
    if ranks == 1 or exchange == "allgather":
        return "allgather"
    if exchange == "sparse_allreduce":
        return exchange
    link = Link(10.0) if link is None else link
    entries = 4 * Layout(k, values).words
    gather = link.seconds((ranks - 1) * entries, ranks - 1)
    reduce = link.seconds(2 * (ranks - 1) * entries / ranks + (ranks - 1) * 8 * sparse.WORDS,
                          3 * (ranks - 1))
    return "sparse_allreduce" if reduce < gather else "allgather"


def costs(numel: int, ranks: int, ratio: float, link: Link, *,
          values: str = "float32") -> dict[str, Cost]:
    """A step's exchange "dense" (float32), "fp16", "topk" (by allgather) and "topk sparse_allreduce".

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its limits.
    """
    check_size(numel, ranks)
    checked_ratio(ratio)
    checks.choice("values", values, VALUE_BYTES)
    ring = 2 * (ranks - 1)
    result = {}
    for name, itemsize in (("dense", DENSE_BYTES), ("fp16", HALF_BYTES)):
        moved = ring_bytes(numel, ranks, itemsize)
        result[name] = Cost(name, moved, link.seconds(moved, ring))
    moved = topk_bytes(numel, ranks, ratio, values)
    result["topk"] = Cost("topk", moved,
                          link.seconds(moved, ranks - 1) + numel * link.select_ns * 1e-9)
    moved = sparse_bytes(numel, ranks, ratio, values)
    result[SPARSE] = Cost(SPARSE, moved,
                          link.seconds(moved, 3 * (ranks - 1)) + numel * link.select_ns * 1e-9)
    return result


def break_even_ranks(ratio: float, itemsize: int, values: str = "float32") -> int:
    """The fewest ranks at which TopK moves at least the bytes of an allreduce of ``itemsize``.

    ``(M-1) ratio (4 + v) = 2 (M-1)/M itemsize``; 1 / ratio against float32.
    """
    return math.ceil(2 * itemsize / (ratio * (4 + VALUE_BYTES[values])) - 1e-9)


def break_even_ratio(ranks: int, itemsize: int, values: str = "float32") -> float:
    """The ratio at which TopK moves the bytes of an allreduce of ``itemsize``, at most 1."""
    return min(1.0, 2 * itemsize / (ranks * (4 + VALUE_BYTES[values])))


def break_even_gbps(numel: int, ranks: int, ratio: float, link: Link, against: str, *,
                    values: str = "float32") -> float:
    """The link speed above which TopK takes longer than ``against``; infinite when never.

    Time is ``a / speed + b`` for both, so the lines cross at most once; 0 when TopK never pays.
    """
    fast = Link(1e12, link.latency_us, link.select_ns)
    ours = costs(numel, ranks, ratio, fast, values=values)
    more_time = ours["topk"].seconds - ours[against].seconds
    fewer_bits = 8 * (ours[against].moved - ours["topk"].moved)
    if fewer_bits <= 0:
        return 0.0
    return math.inf if more_time <= 0 else fewer_bits / more_time / 1e9


def moment_elements(numel: int, ranks: int, server: str, moments: int) -> int:
    """Elements of optimizer state on the fullest rank, when parameters divide evenly."""
    return moments * (math.ceil(numel / ranks) if server == "sharded" else numel)


def weight_bytes(numel: int, ranks: int, server: str) -> int:
    """Bytes of new weights into a rank that owns its share, a step; the owner sends as many on."""
    if server == "replicated" or ranks == 1:
        return 0
    return DENSE_BYTES * (numel if server == "rank0" else numel * (ranks - 1) // ranks)


def default_ratio() -> float:
    """The ratio of ``Compression.topk()``."""
    ratio = TopK().ratio
    assert not callable(ratio)
    return ratio

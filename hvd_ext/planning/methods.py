"""Every way to exchange gradients as stages of messages, with what a rank computes for each.

What is sent when, and in which buckets, is what the front ends do: ``docs/contributing.md``, "The order
of collectives".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from hvd_ext import checks
from hvd_ext.buckets import DEFAULT_BUCKET_BYTES, DENSE, Bucket, plan_buckets
from hvd_ext.planning.exchange import Exchange, Message, Stage
from hvd_ext.planning.work import Work
from hvd_ext.planning.workload import Workload
from hvd_ext.powersgd import PowerSGD, matrices, sizes
from hvd_ext.topk import sparse
from hvd_ext.topk.config import TopK, keep_count
from hvd_ext.topk.wire import Layout

FLOAT, HALF = 4, 2
REPLIES = ("none", "fp16", "topk")
COUPLINGS = ("block", "lagged", "full")
AGREEMENT = Stage((Message("allgather", 32, counted=False),))
"""What all ranks exchange about a step before its results are used."""


@dataclass(frozen=True)
class Setup:
    """What the methods are planned for.

    Args:
        workload: the model.
        ranks: M.
        work: what computing takes.
        ratio: TopK's kept fraction.
        values: type of TopK's values on the wire.
        rank: of PowerSGD's approximation.
        bucket_bytes: gradient that travels together.
        topk_bucket_bytes: the same for TopK.
        samples: SENG: samples of a rank in its curvature, rho.
        update_freq: SENG: steps from one refresh to the next.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its limits.
    """

    workload: Workload
    ranks: int
    work: Work = field(default_factory=Work)
    ratio: float = 0.01
    values: str = "float32"
    rank: int = 4
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    topk_bucket_bytes: int = field(default_factory=lambda: TopK().bucket_bytes)
    samples: int = 32
    update_freq: int = 200

    def __post_init__(self) -> None:
        checks.whole("ranks", self.ranks, low=1)
        TopK(self.ratio, values=self.values)
        PowerSGD(self.rank)
        for name in ("bucket_bytes", "topk_bucket_bytes", "samples", "update_freq"):
            checks.whole(name, getattr(self, name), low=1)

    @property
    def numel(self) -> int:
        """All elements."""
        return self.workload.numel

    def ns(self, nanoseconds: float, elements: float | None = None) -> float:
        """Seconds for so many elements, all unless given."""
        return 1e-9 * nanoseconds * (self.numel if elements is None else elements)

    def entries(self, numel: int) -> int:
        """Bytes of TopK's message for so many elements."""
        return 4 * Layout(keep_count(numel, self.ratio), self.values).words

    @property
    def update(self) -> float:
        """Seconds of the update of all parameters."""
        return self.ns(self.work.update_ns)

    def ready(self, bucket: Bucket) -> int:
        """The place in the backward pass of the bucket's last gradient."""
        return len(self.workload.shapes) - 1 - min(slot.index for slot in bucket.slots)

    def buckets(self, bucket_bytes: int | None = None) -> list[Bucket]:
        """Those of all gradients."""
        return plan_buckets(self.workload.specs(), bucket_bytes=bucket_bytes or self.bucket_bytes)

    def routed(self, settings: TopK | PowerSGD, bucket_bytes: int) -> tuple[list[Bucket], list[Bucket]]:
        """The buckets of what a compression compresses, and of what it sends whole."""
        specs = self.workload.specs()
        routes = ["compressed" if settings.compresses(one.name, one.shape) else DENSE for one in specs]
        planned = plan_buckets(self.workload.specs(routes), bucket_bytes=bucket_bytes)
        return ([one for one in planned if one.kind.route != DENSE],
                [one for one in planned if one.kind.route == DENSE])


def _in_order(messages: list[Message]) -> tuple[Message, ...]:
    return tuple(sorted(messages, key=lambda one: one.needs))


def plain(setup: Setup, *, half: bool = False) -> Exchange:
    """Horovod's allreduce of every gradient as it is ready, in float32 or half precision."""
    messages = []
    cast = setup.work.cast_ns if half else 0.0
    for place, numel in enumerate(reversed(setup.workload.sizes)):
        messages.append(Message("allreduce_half" if half else "allreduce", numel * (HALF if half else FLOAT),
                                needs=place, before=setup.ns(cast, numel), after=setup.ns(cast, numel),
                                fuses=True))
    return Exchange("fp16" if half else "dense", (Stage(tuple(messages)),), end=setup.update)


def powersgd(setup: Setup) -> Exchange:
    """Two allreduces of factors; vectors whole."""
    settings, work = PowerSGD(setup.rank), setup.work
    packed, whole = setup.routed(settings, setup.bucket_bytes)
    product = work.product_ns * setup.rank
    first = [_whole(setup, one) for one in whole]
    second = []
    specs = setup.workload.specs()
    for bucket in packed:
        p, q = sizes(matrices(bucket, specs, setup.rank))
        first.append(Message("allreduce", p * FLOAT, needs=setup.ready(bucket), fuses=True,
                             before=setup.ns(2 * work.pass_ns + product, bucket.numel)))
        second.append(Message("allreduce", q * FLOAT, before=setup.ns(product, bucket.numel), fuses=True))
    end = setup.ns(product + 3 * work.pass_ns) + setup.update
    return Exchange(f"powersgd rank {setup.rank}",
                    (Stage(_in_order(first)), AGREEMENT, Stage(tuple(second))), end=end)


def _whole(setup: Setup, bucket: Bucket) -> Message:
    """What a compression sends whole."""
    each = setup.ns(setup.work.pass_ns, bucket.numel)
    return Message("allreduce", bucket.numel * FLOAT, needs=setup.ready(bucket), fuses=True, before=each)


def delay(setup: Setup) -> Exchange:
    """Slices to their owners, the recursion over all ranks' rows of a slice, slices back."""
    work, ranks = setup.work, setup.ranks
    first, second = [], []
    for bucket in setup.buckets():
        first.append(Message("alltoall", bucket.numel * FLOAT, needs=setup.ready(bucket),
                             before=setup.ns(2 * work.pass_ns, bucket.numel)))
        # M rows of numel / M elements.
        second.append(Message("allgather", bucket.numel * FLOAT / ranks, fuses=True,
                              before=setup.ns(work.recursion_ns, bucket.numel)))
    return Exchange("delay", (Stage(tuple(first)), AGREEMENT, Stage(tuple(second))), goes_on=True,
                    end=setup.ns(work.pass_ns) + setup.update)


def topk(setup: Setup) -> Exchange:
    """The entries of all ranks to all ranks; M k of them to add up."""
    work = setup.work
    packed, whole = setup.routed(TopK(setup.ratio), setup.topk_bucket_bytes)
    messages, adding = [_whole(setup, one) for one in whole], 0.0
    for bucket in packed:
        messages.append(Message("allgather", setup.entries(bucket.numel), needs=setup.ready(bucket),
                                before=setup.ns(work.select_ns, bucket.numel), fuses=True))
        adding += setup.ns(work.scatter_ns, setup.ranks * keep_count(bucket.numel, setup.ratio))
    end = adding + setup.ns(3 * work.pass_ns) + setup.update
    return Exchange("topk", (Stage(_in_order(messages)), AGREEMENT), end=end)


def topk_sparse(setup: Setup) -> Exchange:
    """Entries to their owners, the owners' thresholds, the largest means back: 2 k, however many ranks."""
    if setup.ranks == 1:
        return replace(topk(setup), name="topk sparse_allreduce")
    work, ranks = setup.work, setup.ranks
    packed, whole = setup.routed(TopK(setup.ratio), setup.topk_bucket_bytes)
    first, third = [_whole(setup, one) for one in whole], []
    summing = scattering = 0.0
    for bucket in packed:
        k = keep_count(bucket.numel, setup.ratio)
        entries = setup.entries(bucket.numel)
        first.append(Message("alltoall", entries, needs=setup.ready(bucket),
                             before=setup.ns(work.select_ns, bucket.numel)))
        # Each owner adds up about k entries and selects from a range of numel / M.
        summing += setup.ns(work.scatter_ns, k) + setup.ns(2 * work.pass_ns + work.select_ns,
                                                           bucket.numel / ranks)
        third.append(Message("allgather", entries / ranks, fuses=True))
        scattering += setup.ns(work.scatter_ns, k)
    told = Message("allgather", 8 * sparse.WORDS * len(packed))
    end = scattering + setup.ns(2 * work.pass_ns) + setup.update
    return Exchange("topk sparse_allreduce",
                    (Stage(_in_order(first)), AGREEMENT, Stage((told,), work=summing), Stage(tuple(third))),
                    end=end)


def sharded(setup: Setup, *, half: bool = False) -> Exchange:
    """Plain reduction with every gradient to its owner only, and the owners' new weights to all."""
    work, size = setup.work, HALF if half else FLOAT
    first = []
    for bucket in setup.buckets():
        first.append(Message("alltoall", bucket.numel * size, needs=setup.ready(bucket),
                             before=setup.ns(work.cast_ns if half else work.pass_ns, bucket.numel),
                             after=setup.ns(work.cast_ns if half else work.pass_ns, bucket.numel)))
    return _replied(setup, Exchange("sharded, fp16" if half else "sharded", (Stage(tuple(first)),)),
                    "sharded", "none")


def served(setup: Setup, way: Exchange, server: str, reply: str = "none") -> Exchange:
    """A reduction to all ranks under a server, whose weights follow.

    Args:
        way: what :func:`plain`, :func:`topk`, ... gave.
        server: "rank0" or "sharded".
        reply: what comes back: weights ("none"), their change in half precision ("fp16") or its largest
            entries ("topk"). "fp16" and "topk" are what a server with compressed replies would send.
    """
    checks.choice("server", server, ("rank0", "sharded"))
    name = {"none": "", "fp16": ", fp16 reply", "topk": ", topk reply"}[
        checks.choice("reply", reply, REPLIES)]
    own = server if way.name == "dense" else f"{way.name}, {server}"
    return _replied(setup, replace(way, name=own + name, end=way.end - setup.update), server, reply)


def _replied(setup: Setup, way: Exchange, server: str, reply: str) -> Exchange:
    work, share = setup.work, 1 if server == "rank0" else setup.ranks
    collective = "broadcast" if server == "rank0" else "allgather"
    messages = []
    for bucket in setup.buckets():
        size: float = FLOAT * bucket.numel / share
        before = work.pass_ns
        after = setup.ns(work.pass_ns, bucket.numel)
        if reply == "fp16":
            size, before = size / 2, work.cast_ns + work.pass_ns
            after += setup.ns(work.cast_ns, bucket.numel)
        elif reply == "topk":
            size, before = setup.entries(bucket.numel) / share, work.select_ns
            after = setup.ns(work.scatter_ns, keep_count(bucket.numel, setup.ratio))
        messages.append(Message(collective, size, before=setup.ns(before, bucket.numel / share), after=after,
                                fuses=collective == "allgather"))
    update = way.end + setup.update / share
    return replace(way, stages=(*way.stages, Stage(tuple(messages), work=update)), end=0.0)


def late(setup: Setup, way: Exchange) -> Exchange:
    """The same one step late: sent when the step ends, and compensated when it is applied."""
    work = setup.work
    name = "late" if way.name == "dense" else f"late, {way.name}"
    return replace(way, name=name, late=True,
                   end=way.end + setup.ns(work.compensate_ns + work.pass_ns))


def seng(setup: Setup, coupling: str) -> Exchange:
    """Dense gradients and SENG's messages, without what its curvature costs to compute.

    ``uc="exact"``: as many numbers as parameters. "full" also brings the ranks' sketches together at a
    refresh, counted with its share of a step.
    """
    checks.choice("coupling", coupling, COUPLINGS)
    way = replace(plain(setup), name=f"seng {coupling}")
    layers = tuple(Message("allreduce", numel * FLOAT, fuses=True) for numel in setup.workload.sizes)
    if coupling == "lagged":
        return replace(way, beside=layers)
    stages = (*way.stages, Stage(layers))
    if coupling == "full":
        # (rho, q) of each layer, q at most 262,144 columns.
        numbers = setup.samples * sum(min(numel, 262_144) for numel in setup.workload.sizes)
        return replace(way, stages=stages, refresh=(Message("allgather", numbers * FLOAT),),
                       update_freq=setup.update_freq)
    return replace(way, stages=stages)


def _late(way: Callable[[Setup], Exchange]) -> Callable[[Setup], Exchange]:
    return lambda setup: late(setup, way(setup))


def _served(way: Callable[[Setup], Exchange], server: str, reply: str) -> Callable[[Setup], Exchange]:
    return lambda setup: served(setup, way(setup), server, reply)


def _fp16(setup: Setup) -> Exchange:
    return plain(setup, half=True)


METHODS: tuple[Callable[[Setup], Exchange], ...] = (
    plain, _fp16, powersgd, topk, topk_sparse, delay,
    *(_served(plain, "rank0", reply) for reply in REPLIES),
    sharded, lambda setup: sharded(setup, half=True),
    *(_served(topk, server, reply) for server in ("rank0", "sharded") for reply in ("none", "topk")),
    *(_late(way) for way in (plain, _fp16, topk, topk_sparse, delay)),
    *((lambda setup, coupling=coupling: seng(setup, coupling)) for coupling in COUPLINGS),
)


def exchanges(setup: Setup, names: tuple[str, ...] = ()) -> Iterator[Exchange]:
    """All methods, or those whose name contains one of ``names``.

    Raises:
        ValueError: there is no such method.
    """
    found = [way(setup) for way in METHODS]
    for name in names:
        if not any(name in one.name for one in found):
            raise ValueError(f"no method has {name!r} in its name; there are "
                             f"{', '.join(one.name for one in found)}")
    yield from (one for one in found if not names or any(name in one.name for name in names))

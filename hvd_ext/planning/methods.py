"""Every way to exchange gradients as stages of messages, with what a rank computes for each.

What is sent when, and in which buckets, is what the front ends do: ``docs/collectives.md``, "The order
of collectives".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from hvd_ext import checks
from hvd_ext.planning.compute_costs import ComputeCosts
from hvd_ext.planning.exchange import Exchange, Message, Stage
from hvd_ext.planning.workload import Workload
from hvd_ext.reducers.buckets import DEFAULT_BUCKET_BYTES, DENSE, Bucket, plan_buckets
from hvd_ext.reducers.powersgd import PowerSGD, factor_sizes, plan_matrices
from hvd_ext.reducers.topk import allreduce
from hvd_ext.reducers.topk.config import TopK, keep_count
from hvd_ext.reducers.topk.wire import Layout

FLOAT, HALF = 4, 2
REPLIES = ("none", "fp16", "topk")
COUPLINGS = ("block", "lagged", "full")
AGREEMENT = Stage((Message("allgather", 32, counted=False),))
"""What all ranks exchange about a step before its results are used."""


@dataclass(frozen=True)
class Scenario:
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
    work: ComputeCosts = field(default_factory=ComputeCosts)
    ratio: float = 0.01
    values: str = "float32"
    rank: int = 4
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    topk_bucket_bytes: int = field(default_factory=lambda: TopK().bucket_bytes)
    samples: int = 32
    update_freq: int = 200

    def __post_init__(self) -> None:
        checks.check_int("ranks", self.ranks, low=1)
        TopK(self.ratio, values=self.values)
        PowerSGD(self.rank)
        for name in ("bucket_bytes", "topk_bucket_bytes", "samples", "update_freq"):
            checks.check_int(name, getattr(self, name), low=1)

    @property
    def numel(self) -> int:
        """All elements."""
        return self.workload.numel

    def compute_seconds(self, nanoseconds: float, elements: float | None = None) -> float:
        """Seconds for so many elements, all unless given."""
        return 1e-9 * nanoseconds * (self.numel if elements is None else elements)

    def topk_message_bytes(self, numel: int) -> int:
        """Bytes of TopK's message for so many elements."""
        return 4 * Layout(keep_count(numel, self.ratio), self.values).words

    @property
    def update(self) -> float:
        """Seconds of the update of all parameters."""
        return self.compute_seconds(self.work.update_ns)

    def ready_position(self, bucket: Bucket) -> int:
        """The place in the backward pass of the bucket's last gradient."""
        return len(self.workload.shapes) - 1 - min(slot.index for slot in bucket.slots)

    def plan_buckets(self, bucket_bytes: int | None = None) -> list[Bucket]:
        """Those of all gradients."""
        return plan_buckets(self.workload.tensor_specs(), bucket_bytes=bucket_bytes or self.bucket_bytes)

    def split_buckets(self, settings: TopK | PowerSGD, bucket_bytes: int) -> tuple[list[Bucket],
                                                                                   list[Bucket]]:
        """The buckets of what a compression compresses, and of what it sends whole."""
        specs = self.workload.tensor_specs()
        routes = ["compressed" if settings.should_compress(one.name, one.shape) else DENSE for one in specs]
        planned = plan_buckets(self.workload.tensor_specs(routes), bucket_bytes=bucket_bytes)
        return ([one for one in planned if one.kind.route != DENSE],
                [one for one in planned if one.kind.route == DENSE])


def _in_order(messages: list[Message]) -> tuple[Message, ...]:
    return tuple(sorted(messages, key=lambda one: one.needs))


def plan_dense(setup: Scenario, *, half: bool = False) -> Exchange:
    """Horovod's allreduce of every gradient as it is ready, in float32 or half precision."""
    messages = []
    cast = setup.work.cast_ns if half else 0.0
    for place, numel in enumerate(reversed(setup.workload.sizes)):
        messages.append(Message("allreduce_half" if half else "allreduce", numel * (HALF if half else FLOAT),
                                needs=place, before=setup.compute_seconds(cast, numel),
                                after=setup.compute_seconds(cast, numel),
                                fuses=True))
    return Exchange("fp16" if half else "dense", (Stage(tuple(messages)),), end=setup.update)


def plan_powersgd(setup: Scenario) -> Exchange:
    """Two allreduces of factors; vectors whole."""
    settings, work = PowerSGD(setup.rank), setup.work
    packed, whole = setup.split_buckets(settings, setup.bucket_bytes)
    product = work.product_ns * setup.rank
    first = [_dense_message(setup, one) for one in whole]
    second = []
    specs = setup.workload.tensor_specs()
    for bucket in packed:
        p, q = factor_sizes(plan_matrices(bucket, specs, setup.rank))
        first.append(Message("allreduce", p * FLOAT, needs=setup.ready_position(bucket), fuses=True,
                             before=setup.compute_seconds(2 * work.pass_ns + product, bucket.numel)))
        second.append(Message("allreduce", q * FLOAT, before=setup.compute_seconds(product, bucket.numel),
                              fuses=True))
    end = setup.compute_seconds(product + 3 * work.pass_ns) + setup.update
    return Exchange(f"powersgd rank {setup.rank}",
                    (Stage(_in_order(first)), AGREEMENT, Stage(tuple(second))), end=end)


def _dense_message(setup: Scenario, bucket: Bucket) -> Message:
    """What a compression sends whole."""
    each = setup.compute_seconds(setup.work.pass_ns, bucket.numel)
    return Message("allreduce", bucket.numel * FLOAT, needs=setup.ready_position(bucket), fuses=True,
                   before=each)


def plan_delay(setup: Scenario) -> Exchange:
    """Slices to their owners, the recursion over all ranks' rows of a slice, slices back."""
    work, ranks = setup.work, setup.ranks
    first, second = [], []
    for bucket in setup.plan_buckets():
        first.append(Message("alltoall", bucket.numel * FLOAT, needs=setup.ready_position(bucket),
                             before=setup.compute_seconds(2 * work.pass_ns, bucket.numel)))
        # M rows of numel / M elements.
        second.append(Message("allgather", bucket.numel * FLOAT / ranks, fuses=True,
                              before=setup.compute_seconds(work.recursion_ns, bucket.numel)))
    return Exchange("delay", (Stage(tuple(first)), AGREEMENT, Stage(tuple(second))), goes_on=True,
                    end=setup.compute_seconds(work.pass_ns) + setup.update)


def plan_topk(setup: Scenario) -> Exchange:
    """The entries of all ranks to all ranks; M k of them to add up."""
    work = setup.work
    packed, whole = setup.split_buckets(TopK(setup.ratio), setup.topk_bucket_bytes)
    messages, adding = [_dense_message(setup, one) for one in whole], 0.0
    for bucket in packed:
        messages.append(Message("allgather", setup.topk_message_bytes(bucket.numel),
                                needs=setup.ready_position(bucket),
                                before=setup.compute_seconds(work.select_ns, bucket.numel), fuses=True))
        adding += setup.compute_seconds(work.scatter_ns, setup.ranks * keep_count(bucket.numel, setup.ratio))
    end = adding + setup.compute_seconds(3 * work.pass_ns) + setup.update
    return Exchange("topk", (Stage(_in_order(messages)), AGREEMENT), end=end)


def topk_sparse(setup: Scenario) -> Exchange:
    """Entries to their owners, the owners' thresholds, the largest means back: 2 k, however many ranks."""
    if setup.ranks == 1:
        return replace(plan_topk(setup), name="topk sparse_allreduce")
    work, ranks = setup.work, setup.ranks
    packed, whole = setup.split_buckets(TopK(setup.ratio), setup.topk_bucket_bytes)
    first, third = [_dense_message(setup, one) for one in whole], []
    summing = scattering = 0.0
    for bucket in packed:
        k = keep_count(bucket.numel, setup.ratio)
        entries = setup.topk_message_bytes(bucket.numel)
        first.append(Message("alltoall", entries, needs=setup.ready_position(bucket),
                             before=setup.compute_seconds(work.select_ns, bucket.numel)))
        # Each owner adds up about k entries and selects from a range of numel / M.
        summing += setup.compute_seconds(work.scatter_ns,
                                         k) + setup.compute_seconds(2 * work.pass_ns + work.select_ns,
                                                                    bucket.numel / ranks)
        third.append(Message("allgather", entries / ranks, fuses=True))
        scattering += setup.compute_seconds(work.scatter_ns, k)
    told = Message("allgather", 8 * allreduce.WORDS * len(packed))
    end = scattering + setup.compute_seconds(2 * work.pass_ns) + setup.update
    return Exchange("topk sparse_allreduce",
                    (Stage(_in_order(first)), AGREEMENT, Stage((told,), work=summing), Stage(tuple(third))),
                    end=end)


def plan_sharded(setup: Scenario, *, half: bool = False) -> Exchange:
    """Plain reduction with every gradient to its owner only, and the owners' new weights to all."""
    work, size = setup.work, HALF if half else FLOAT
    first = []
    for bucket in setup.plan_buckets():
        first.append(Message("alltoall", bucket.numel * size, needs=setup.ready_position(bucket),
                             before=setup.compute_seconds(work.cast_ns if half else work.pass_ns,
                                                          bucket.numel),
                             after=setup.compute_seconds(work.cast_ns if half else work.pass_ns,
                                                         bucket.numel)))
    return _with_downlink(setup, Exchange("sharded, fp16" if half else "sharded", (Stage(tuple(first)),)),
                          "sharded", "none")


def with_server(setup: Scenario, way: Exchange, server: str, reply: str = "none") -> Exchange:
    """A reduction to all ranks under a server, whose weights follow.

    Args:
        way: what :func:`plan_dense`, :func:`plan_topk`, ... gave.
        server: "rank0" or "sharded".
        reply: what comes back: weights ("none"), their change in half precision ("fp16") or its largest
            entries ("topk"). "fp16" and "topk" are what a server with compressed replies would send.
    """
    checks.check_choice("server", server, ("rank0", "sharded"))
    name = {"none": "", "fp16": ", fp16 reply", "topk": ", topk reply"}[
        checks.check_choice("reply", reply, REPLIES)]
    own = server if way.name == "dense" else f"{way.name}, {server}"
    return _with_downlink(setup, replace(way, name=own + name, end=way.end - setup.update), server, reply)


def _with_downlink(setup: Scenario, way: Exchange, server: str, reply: str) -> Exchange:
    work, share = setup.work, 1 if server == "rank0" else setup.ranks
    collective = "broadcast" if server == "rank0" else "allgather"
    messages = []
    for bucket in setup.plan_buckets():
        size: float = FLOAT * bucket.numel / share
        before = work.pass_ns
        after = setup.compute_seconds(work.pass_ns, bucket.numel)
        if reply == "fp16":
            size, before = size / 2, work.cast_ns + work.pass_ns
            after += setup.compute_seconds(work.cast_ns, bucket.numel)
        elif reply == "topk":
            size, before = setup.topk_message_bytes(bucket.numel) / share, work.select_ns
            after = setup.compute_seconds(work.scatter_ns, keep_count(bucket.numel, setup.ratio))
        messages.append(Message(collective, size, before=setup.compute_seconds(before, bucket.numel / share),
                                after=after,
                                fuses=collective == "allgather"))
    update = way.end + setup.update / share
    return replace(way, stages=(*way.stages, Stage(tuple(messages), work=update)), end=0.0)


def plan_delayed(setup: Scenario, way: Exchange) -> Exchange:
    """The same one step late: sent when the step ends, and compensated when it is applied."""
    work = setup.work
    name = "overlap" if way.name == "dense" else f"overlap, {way.name}"
    return replace(way, name=name, delayed=True,
                   end=way.end + setup.compute_seconds(work.compensate_ns + work.pass_ns))


def plan_seng(setup: Scenario, coupling: str) -> Exchange:
    """Dense gradients and SENG's messages, without what its curvature costs to compute.

    ``uc="exact"``: as many numbers as parameters. "full" also brings the ranks' sketches together at a
    refresh, counted with its share of a step.
    """
    checks.check_choice("coupling", coupling, COUPLINGS)
    way = replace(plan_dense(setup), name=f"seng {coupling}")
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


def _delayed_method(way: Callable[[Scenario], Exchange]) -> Callable[[Scenario], Exchange]:
    return lambda setup: plan_delayed(setup, way(setup))


def _server_method(way: Callable[[Scenario], Exchange], server: str, reply: str) -> Callable[[Scenario],
                                                                                             Exchange]:
    return lambda setup: with_server(setup, way(setup), server, reply)


def _plan_fp16(setup: Scenario) -> Exchange:
    return plan_dense(setup, half=True)


METHODS: tuple[Callable[[Scenario], Exchange], ...] = (
    plan_dense, _plan_fp16, plan_powersgd, plan_topk, topk_sparse, plan_delay,
    *(_server_method(plan_dense, "rank0", reply) for reply in REPLIES),
    plan_sharded, lambda setup: plan_sharded(setup, half=True),
    *(_server_method(plan_topk, server, reply) for server in ("rank0", "sharded")
      for reply in ("none", "topk")),
    *(_delayed_method(way) for way in (plan_dense, _plan_fp16, plan_topk, topk_sparse, plan_delay)),
    *((lambda setup, coupling=coupling: plan_seng(setup, coupling)) for coupling in COUPLINGS),
)


def plan_exchanges(setup: Scenario, names: tuple[str, ...] = ()) -> Iterator[Exchange]:
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

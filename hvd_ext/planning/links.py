"""How ranks are connected: hosts, the ranks of each, and the links inside of a host and between hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hvd_ext import checks

COLLECTIVES = ("allreduce", "allreduce_half", "reduce_scatter", "allgather", "alltoall", "broadcast")


@dataclass(frozen=True)
class Link:
    """A link in the alpha-beta model.

    Args:
        gbps: gigabits per second, each way.
        latency_us: microseconds of one hop.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its limits.
    """

    gbps: float
    latency_us: float = 20.0

    def __post_init__(self) -> None:
        checks.check_float("gbps", self.gbps, low=0.0, open_low=True,
                           hint="10 Gbit/s Ethernet is gbps=10")
        checks.check_float("latency_us", self.latency_us, low=0.0)

    def transfer_seconds(self, moved: float, hops: int) -> float:
        """Time to move so many bytes in so many hops."""
        return moved / (self.gbps * 1e9 / 8) + hops * self.latency_us * 1e-6


@dataclass(frozen=True)
class Cluster:
    """Hosts with equally many ranks.

    Args:
        hosts: number of hosts, H.
        outer: the link of each host to the others, shared by its ranks.
        per_host: ranks of each host, L.
        inner: the link of each rank to the others of its host: NVLink, PCIe or shared memory.
        hierarchical: collectives go inside of the hosts first, then once between them, as with
            HOROVOD_HIERARCHICAL_ALLREDUCE; otherwise in one ring over all ranks, whose neighbours are on
            one host where possible.
        fixed_us: microseconds that each collective takes beside its hops, such as Horovod's agreement
            about what is ready.
        measured: by collective, the link as it was measured with that collective. It stands for all links
            on the collective's way.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its limits.
    """

    hosts: int
    outer: Link
    per_host: int = 1
    inner: Link = field(default_factory=lambda: Link(400.0, 5.0))
    hierarchical: bool = False
    fixed_us: float = 0.0
    measured: Mapping[str, Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.check_int("hosts", self.hosts, low=1)
        checks.check_int("ranks per host", self.per_host, low=1)
        checks.check_bool("hierarchical", self.hierarchical)
        checks.check_float("fixed_us", self.fixed_us, low=0.0)
        for name in self.measured:
            checks.check_choice("a measured collective", name, COLLECTIVES)

    @classmethod
    def one_rank_per_host(cls, ranks: int, link: Link) -> Cluster:
        """``ranks`` hosts with one rank each."""
        return cls(checks.check_int("ranks", ranks, low=1), link)

    @property
    def ranks(self) -> int:
        """M."""
        return self.hosts * self.per_host

    def of_hosts(self, hosts: int) -> Cluster:
        """The same with another number of hosts."""
        return replace(self, hosts=hosts)

    @property
    def narrow(self) -> str:
        """The link that decides: "outer", or "inner" on a single host."""
        return "outer" if self.hosts > 1 or self.per_host == 1 else "inner"

    def at_speed(self, gbps: float) -> Cluster:
        """The same with another speed of the link that decides, whatever was measured."""
        return replace(self, measured={}, **{self.narrow: replace(getattr(self, self.narrow), gbps=gbps)})

    def to_dict(self) -> dict[str, Any]:
        """For a file; :meth:`from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Cluster:
        """What :meth:`to_dict` gave.

        Raises:
            TypeError, ValueError, KeyError: it is something else.
        """
        links = {name: Link(**saved[name]) for name in ("outer", "inner")}
        measured = {name: Link(**link) for name, link in saved["measured"].items()}
        return cls(**{**saved, **links, "measured": measured})

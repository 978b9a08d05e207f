"""Who does what: which ranks serve, which slice of the flat parameters each server owns."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hvd_ext import checks


@dataclass(frozen=True)
class Plan:
    """The roles of ``size`` ranks for ``numel`` parameters.

    The first ``servers`` ranks serve, rank 0 being the primary one, which puts all updates in
    order; the others are workers. Server s owns ``slices[s]`` of the flat parameters (numel,).

    Args:
        size: number of ranks, at least 2.
        servers: number of server ranks, at least 1, fewer than ``size`` and at most ``numel``.
        numel: number of parameters (scalars).

    Raises:
        ValueError: a number is out of range; the message says what to change.
    """

    size: int
    servers: int
    numel: int

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(
                "a parameter server needs at least 2 ranks, one server and one worker, got "
                f"{self.size}; start the program with mpirun -np 2 or more"
            )
        checks.check_int("servers", self.servers, low=1, high=self.size - 1,
                         hint=f"of {self.size} ranks at least one must be a worker")
        if self.numel < 1:
            raise ValueError("the model has no trainable parameter; pass at least one")
        if self.servers > self.numel:
            raise ValueError(
                f"servers must be at most the {self.numel} parameters there are to slice, got "
                f"{self.servers}; start fewer servers"
            )

    @property
    def workers(self) -> int:
        """Number of workers."""
        return self.size - self.servers

    @property
    def slices(self) -> tuple[slice, ...]:
        """The slice of each server: contiguous, together all, sizes differing by at most 1."""
        base, rest = divmod(self.numel, self.servers)
        cuts = [server * base + min(server, rest) for server in range(self.servers + 1)]
        return tuple(slice(low, high) for low, high in pairwise(cuts))

    def is_server(self, rank: int) -> bool:
        """Whether a rank serves."""
        return rank < self.servers

    def worker_number(self, rank: int) -> int:
        """A worker rank's number among the workers, from 0."""
        return rank - self.servers

    def rank(self, worker: int) -> int:
        """The rank of a worker."""
        return self.servers + worker

"""Ranks as threads of one process: the exchange of a method without a cluster, with every byte counted.

What is measured with it is what is sent and what comes of it, never how long it takes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from hvd_ext.reducers.traffic import Traffic, by_kind


class Arrived:
    """A collective that is over."""

    def __init__(self, result: torch.Tensor) -> None:
        self._result = result

    def wait(self) -> torch.Tensor:
        """Its result."""
        return self._result


class LocalCollectives:
    """What ``hvd_ext.torch.collectives.Collectives`` offers a sparse allreduce, for one of the threads."""

    def __init__(self, ranks: LocalRanks, rank: int) -> None:
        self._ranks = ranks
        self.rank = rank
        self.size = ranks.size
        self.traffic = Traffic()

    def _count(self, kind: str | Mapping[str, int], *, sent: int, received: int) -> None:
        out, back = by_kind(kind, sent), by_kind(kind, received)
        for part in out:
            self.traffic.count_bytes(part, sent=out[part], received=back[part])

    def allgather_async(self, tensor: torch.Tensor, name: str, *, kind: Any = "gradients") -> Arrived:
        """Concatenate the ranks' tensors."""
        everyone = self._ranks.exchange(self.rank, tensor)
        own = tensor.numel() * tensor.element_size()
        result = torch.cat(everyone)
        self._count(kind, sent=(self.size - 1) * own,
                    received=result.numel() * result.element_size() - own)
        return Arrived(result)

    def alltoall_async(self, tensor: torch.Tensor, splits: Sequence[int], name: str, *,
                       kind: Any = "gradients") -> Arrived:
        """Send ``splits[s]`` rows to rank s."""
        everyone = self._ranks.exchange(self.rank, tensor.split(list(splits)))
        result = torch.cat([parts[self.rank] for parts in everyone])
        size, own = tensor.element_size(), splits[self.rank] * tensor.element_size()
        self._count(kind, sent=tensor.numel() * size - own, received=result.numel() * size - own)
        return Arrived(result)


class LocalRanks:
    """M threads that run the same function, each with collectives of its own.

    Args:
        size: M.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._slots: list[Any] = [None] * size
        self._pool = ThreadPoolExecutor(size)
        self.collectives = [LocalCollectives(self, rank) for rank in range(size)]

    def exchange(self, rank: int, thing: Any) -> list[Any]:
        """What all ranks gave, by rank."""
        self._slots[rank] = thing
        self._barrier.wait()
        everyone = list(self._slots)
        self._barrier.wait()
        return everyone

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """``function(rank)`` on all ranks at once; the results by rank."""
        def guarded(rank: int) -> Any:
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        return list(self._pool.map(guarded, range(self.size)))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

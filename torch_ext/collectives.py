"""The one place where the PyTorch front end calls Horovod's collectives, and where their bytes are counted.

Everything else hands tensors to a :class:`Collectives` and waits on the :class:`Handle` it gets,
so that names in Horovod's timeline, process sets and byte accounting are decided once.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import horovod.torch as horovod
import torch
from horovod.torch import mpi_ops

from hvd_ext.traffic import Traffic, allreduce_bytes, by_kind


@dataclass
class Handle:
    """A collective under way. ``wait()`` once; it raises ``HorovodInternalError`` when it failed."""

    collectives: Collectives
    ticket: Any
    kind: str | Mapping[str, int]
    counted: bool = True
    dtype: torch.dtype | None = None

    def wait(self) -> torch.Tensor:
        """The result of the collective, a tensor on the device of its input."""
        result = horovod.synchronize(self.ticket)
        tensor = result[0] if isinstance(result, tuple) else result
        if not self.counted:
            for kind, count in by_kind(self.kind, nbytes(tensor)).items():
                self.collectives.traffic.add(kind, received=count)
        return tensor if self.dtype is None else tensor.view(self.dtype)

    def wait_all(self) -> list[torch.Tensor]:
        """The results of a grouped collective, in the order of its inputs."""
        result = horovod.synchronize(self.ticket)
        return list(result) if isinstance(result, tuple) else [result]


class Collectives:
    """Asynchronous, named collectives over one process set.

    ``kind`` says what the bytes are ("gradients", "values", "weights", ...); ``traffic`` adds up
    what this rank sends and receives by kind, from the sizes of the messages themselves. For a
    collective whose bytes depend on the library's algorithm (allreduce, broadcast) the
    bandwidth-optimal ring is counted: ``2 (M-1)/M`` and ``1`` times the tensor.
    """

    def __init__(self, process_set: Any = None) -> None:
        self.process_set = horovod.global_process_set if process_set is None else process_set
        self.traffic = Traffic()

    @property
    def included(self) -> bool:
        """Whether this rank is a member of the process set."""
        return bool(self.process_set.included())

    @property
    def size(self) -> int:
        """M, the number of ranks."""
        return int(self.process_set.size())

    @property
    def rank(self) -> int:
        """This rank's number within the process set."""
        return int(self.process_set.rank())

    def global_rank(self, rank: int) -> int:
        """The global number of the process set's member ``rank``; broadcasts name roots so."""
        ranks = self.process_set.ranks
        return rank if ranks is None else int(list(ranks)[rank])

    def allreduce_async_(self, tensor: torch.Tensor, name: str, *, op: Any = horovod.Average,
                         kind: str = "gradients", **scale: float) -> Handle:
        """Reduce ``tensor`` over the ranks, in place."""
        ticket = horovod.allreduce_async_(
            tensor, name=name, op=op, process_set=self.process_set, **scale
        )
        moved = allreduce_bytes(nbytes(tensor), self.size)
        self.traffic.add(kind, sent=moved, received=moved)
        return Handle(self, ticket, kind)

    def grouped_allreduce_async_(self, tensors: Sequence[torch.Tensor], name: str, *,
                                 op: Any = horovod.Average, kind: str = "gradients",
                                 **scale: float) -> Handle:
        """Reduce tensors of one dtype and device as one group, in place; see ``Handle.wait_all``."""
        if len(tensors) == 1:
            return self.allreduce_async_(tensors[0], name, op=op, kind=kind, **scale)
        ticket = horovod.grouped_allreduce_async_(
            list(tensors), name=name, op=op, process_set=self.process_set, **scale
        )
        moved = allreduce_bytes(sum(map(nbytes, tensors)), self.size)
        self.traffic.add(kind, sent=moved, received=moved)
        return Handle(self, ticket, kind)

    def alltoall_async(self, tensor: torch.Tensor, splits: Sequence[int], name: str, *,
                       kind: str = "gradients", out: torch.Tensor | None = None) -> Handle:
        """Send ``splits[s]`` rows of ``tensor`` to rank s; the result is what all sent here, by rank.

        ``out`` lends memory for the result, which is resized in place: fresh memory for every
        message costs more in page faults than the message itself on a CPU.
        """
        ticket = mpi_ops._alltoall_async(
            _carrier(tensor), torch.tensor(splits, dtype=torch.int32), _memory(out, tensor),
            torch.empty(0, dtype=torch.int32), name, self.process_set,
        )
        row = nbytes(tensor) // max(1, tensor.shape[0])
        own = splits[self.rank] * row
        self.traffic.add(kind, sent=nbytes(tensor) - own, received=-own)
        return Handle(self, ticket, kind, counted=False, dtype=tensor.dtype)

    def allgather_async(self, tensor: torch.Tensor, name: str, *,
                        kind: str | Mapping[str, int] = "gradients",
                        out: torch.Tensor | None = None) -> Handle:
        """Concatenate the ranks' tensors along their first axis, whose length may differ by rank.

        A message that holds several kinds says with ``kind`` how many bytes are of each. ``out``
        lends memory for the result, as in :meth:`alltoall_async`.
        """
        ticket = mpi_ops._allgather_async(
            _carrier(tensor), _memory(out, tensor), name, self.process_set
        )
        for part, own in by_kind(kind, nbytes(tensor)).items():
            self.traffic.add(part, sent=(self.size - 1) * own, received=-own)
        return Handle(self, ticket, kind, counted=False, dtype=tensor.dtype)

    def broadcast_async_(self, tensor: torch.Tensor, root: int, name: str, *,
                         kind: str = "weights") -> Handle:
        """Copy the tensor of member ``root`` of the process set to all, in place."""
        ticket = horovod.broadcast_async_(
            _carrier(tensor), self.global_rank(root), name=name, process_set=self.process_set
        )
        if self.rank == root:
            self.traffic.add(kind, sent=(self.size - 1) * nbytes(tensor))
        else:
            self.traffic.add(kind, received=nbytes(tensor))
        return Handle(self, ticket, kind)

    def allgather_object(self, thing: Any, name: str) -> list[Any]:
        """Every rank's picklable ``thing``, by rank. For errors and checks, not for data."""
        if self.size == 1:
            return [thing]
        mine = torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8)
        sizes = self.allgather_async(torch.tensor([mine.numel()]), f"{name}/sizes", kind="objects").wait()
        gathered = self.allgather_async(mine, name, kind="objects").wait()
        return [pickle.loads(part.numpy().tobytes()) for part in gathered.split(sizes.tolist())]


def _carrier(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory under a dtype that Horovod can move; it knows no bfloat16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _memory(out: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The tensor that Horovod is to resize and fill."""
    return _carrier(like).new_empty(0) if out is None else _carrier(out)


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of the tensor's elements."""
    return tensor.numel() * tensor.element_size()

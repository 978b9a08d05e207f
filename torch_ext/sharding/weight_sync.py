"""How new weights go from their owners to all ranks as they are: one message a bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hvd_ext.sharding import ShardedBucket
from hvd_ext.torch.collectives import Collectives, Handle, count_bytes
from hvd_ext.torch.sharding.shards import flatten_view, put_back

LABEL = "server"
STATUS_WORDS = 1  # behind an owner's weights: whether its update failed


class DenseWeightSync:
    """Sends messages of weights and writes what comes into the parameters.

    Args:
        where: "rank0" or "sharded".
        parameters: gives those that are served, by number.
    """

    collectives: Collectives

    def __init__(self, where: str, parameters: Callable[[], Sequence[torch.Tensor]]) -> None:
        self.where = where
        self._parameters = parameters
        self._weights: dict[int, torch.Tensor] = {}  # of a message, behind them the status
        self._gathered: dict[int, torch.Tensor] = {}

    def start_transfer(self, message: ShardedBucket, failed: bool) -> tuple[Handle, None]:
        """Send this rank's weights; nothing can be wrong with them."""
        rank, flat = self.collectives.rank, self.message_buffer(message)
        begin, parameters = sum(message.splits[:rank]), self._parameters()
        for piece in message.parts[rank]:
            if piece.numel == parameters[piece.index].numel():  # another one was updated in this memory
                at = piece.offset - begin
                flat[at : at + piece.numel] = flatten_view(parameters[piece.index])
        flat[-1] = float(failed)
        name = f"{LABEL}/bucket{message.index}"
        if self.where == "rank0":
            return self.collectives.broadcast_async_(flat, 0, name, kind="weights"), None
        memory = self._gathered.setdefault(message.index, flat.new_empty(0))
        return self.collectives.allgather_async(flat, name, kind="weights", out=memory), None

    def finish_transfer(self, message: ShardedBucket, received: torch.Tensor) -> list[int]:
        """Write the others' weights into the parameters; the owners whose update failed."""
        parameters, end = self._parameters(), 0
        if self.where == "rank0":
            received = self.message_buffer(message)
        flats: dict[int, torch.Tensor] = {}
        failed = []
        for rank, pieces in enumerate(message.parts[:1] if self.where == "rank0" else message.parts):
            end += message.splits[rank] + STATUS_WORDS
            if received[end - STATUS_WORDS] != 0:
                failed.append(rank)
                continue
            for piece in pieces:
                parameter = parameters[piece.index]
                if rank == self.collectives.rank and piece.numel == parameter.numel():
                    continue
                flat = flats.setdefault(piece.index, flatten_view(parameter))
                at = piece.offset + rank * STATUS_WORDS
                flat[piece.start : piece.stop] = received[at : at + piece.numel]
        for number, flat in flats.items():
            put_back(parameters[number], flat)
        return failed

    def message_buffer(self, message: ShardedBucket) -> torch.Tensor:
        """For what this rank owns of the weights of a message, under "rank0" for all of them."""
        if message.index not in self._weights:
            like = self._parameters()[message.pieces[0].index]
            numel = message.numel if self.where == "rank0" else message.splits[self.collectives.rank]
            self._weights[message.index] = torch.zeros(numel + STATUS_WORDS, dtype=like.dtype,
                                                       device=like.device)
        return self._weights[message.index]

    def bytes_held(self) -> int:
        """Bytes of the messages' memory."""
        return sum(map(count_bytes, (*self._weights.values(), *self._gathered.values())))

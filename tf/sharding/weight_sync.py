"""How new weights go from their owners to all ranks as they are.

Under "sharded" one allgather a bucket brings every owner's part. Under "rank0" weights are broadcast, large
ones without a copy. In either case a status travels behind an owner's weights: an element that is not 0
where its update failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from hvd_ext.sharding import ShardedBucket
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.sharding.shards import ProxyVariables, numel_of
from hvd_ext.tensorflow.variables import as_tf

SMALL_BYTES = 2**16  # weights of at most so many bytes travel together; larger ones are not copied

Status = tuple[int, tf.Tensor]
"""An owner, and a 0-D number that is not 0 where its update failed."""


@dataclass(frozen=True)
class Broadcast:
    """What one rank broadcasts: a large variable alone, or small ones and a status behind them."""

    owner: int
    dtype: tf.DType
    inside: list[Any]
    packed: bool

    def build_message(self, rank: int, status: Callable[[tf.DType], tf.Tensor]) -> tf.Tensor:
        """The message's tensor; of no value yet where another rank sends it."""
        if self.owner != rank:
            shape = [sum(self._numels)] if self.packed else self.inside[0].shape
            return tf.raw_ops.Empty(shape=shape, dtype=self.dtype, init=False)
        if not self.packed:
            return as_tf(self.inside[0]).read_value()
        return _concat_values([as_tf(one).read_value() for one in self.inside], status(self.dtype))

    def start_send(self, given: tf.Tensor, collectives: Collectives, name: str) -> tf.Tensor:
        """The owner's tensor."""
        return collectives.broadcast(given, self.owner, name)

    def read_statuses(self, sent: tf.Tensor) -> list[Status]:
        """What the message says of its owner's update."""
        return [(self.owner, sent[-1])] if self.packed else []

    def assign_weights(self, sent: tf.Tensor, rank: int) -> None:
        """Write the owner's weights into the variables."""
        if self.owner == rank and self.packed:
            return  # one that is alone is assigned here too: without a use it would not be sent
        pieces = tf.split(sent, self._numels)[:-1] if self.packed else [sent]
        for variable, piece in zip(self.inside, pieces, strict=True):
            as_tf(variable).assign(tf.reshape(piece, variable.shape))

    @property
    def _numels(self) -> list[int]:
        return [*map(numel_of, self.inside), 1]


@dataclass(frozen=True)
class Gathered:
    """A bucket of which every rank sends what it owns, with a status behind it.

    Attributes:
        message: which pieces of variables, by number, are whose.
        variables: all that are served.
        stand_ins: hold the pieces that this rank owns in part.
    """

    message: ShardedBucket
    variables: Sequence[Any]
    stand_ins: ProxyVariables

    def build_message(self, rank: int, status: Callable[[tf.DType], tf.Tensor]) -> tf.Tensor:
        """This rank's part."""
        own = [self.variables[piece.index] for piece in self.message.parts[rank]]
        held = [self.stand_ins.proxy_of(one) for one in own]
        return _concat_values([as_tf(one if stand_in is None else stand_in).read_value()
                               for one, stand_in in zip(own, held, strict=True)],
                              status(tf.as_dtype(self.message.kind.dtype)))

    def start_send(self, given: tf.Tensor, collectives: Collectives, name: str) -> tf.Tensor:
        """All ranks' parts, one after another."""
        return collectives.allgather(given, name, kind="weights",
                                     rows=self.message.numel + len(self.message.parts))

    def read_statuses(self, sent: tf.Tensor) -> list[Status]:
        """What the message says of the ranks' updates."""
        ends = [sum(self.message.splits[:rank + 1]) + rank for rank in range(len(self.message.parts))]
        return [(rank, sent[end]) for rank, end in enumerate(ends)]

    def assign_weights(self, sent: tf.Tensor, rank: int) -> None:
        """Write the owners' weights into the variables."""
        sizes = [numel for part in self.message.parts for numel in (*(piece.numel for piece in part), 1)]
        values = iter(tf.split(sent, sizes))
        pieces: dict[int, list[tf.Tensor]] = {}
        own = set()
        for owner, part in enumerate(self.message.parts):
            for piece in part:
                pieces.setdefault(piece.index, []).append(next(values))
                if owner == rank and piece.numel == numel_of(self.variables[piece.index]):
                    own.add(piece.index)  # up to date already
            next(values)  # the status
        for index, parts in pieces.items():
            if index not in own:
                variable = self.variables[index]
                as_tf(variable).assign(tf.reshape(tf.concat(parts, axis=0) if len(parts) > 1 else parts[0],
                                                  variable.shape))


def plan_broadcasts(variables: Sequence[Any], owner_of: Callable[[Any], int]) -> list[Broadcast]:
    """Every owner's messages, in the same order on all ranks."""
    plan: list[Broadcast] = []
    for owner in sorted({owner_of(variable) for variable in variables}):
        packed: dict[tf.DType, Broadcast] = {}
        for variable in variables:
            dtype = as_tf(variable).dtype
            if owner_of(variable) != owner:
                continue
            if numel_of(variable) * dtype.size > SMALL_BYTES:
                plan.append(Broadcast(owner, dtype, [variable], False))
            else:
                packed.setdefault(dtype, Broadcast(owner, dtype, [], True)).inside.append(variable)
        plan += packed.values() or [Broadcast(owner, tf.float32, [], True)]
    return plan


def _concat_values(values: Sequence[tf.Tensor], status: tf.Tensor) -> tf.Tensor:
    return tf.concat([*(tf.reshape(one, [-1]) for one in values), status], axis=0)

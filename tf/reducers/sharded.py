"""Plain reduction under ``server="sharded"``: each owner gets the sum of what it owns, for half the bytes.

An allreduce is a reduce-scatter and an allgather. Here an alltoall brings every rank's gradients of a
bucket to their owners, who add them up in the order of the ranks; the allgather that follows the
update brings weights (``server.py``). Each moves (M-1)/M of the bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from hvd_ext.agreement import Fingerprint
from hvd_ext.options import Options, Plain
from hvd_ext.servers import Message
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reducers.base import Gradient
from hvd_ext.tensorflow.reducers.delay_kernels import accumulation_dtype
from hvd_ext.tensorflow.reducers.plain import PlainReducer
from hvd_ext.tensorflow.traffic import put_to_use
from hvd_ext.tensorflow.variables import as_tf


class ShardedReducer(PlainReducer):
    """Sends gradients to their owners; sparse ones go the plain way.

    What is returned for a variable that another rank owns is this rank's own gradient, which nothing may
    be made of but nothing: :meth:`owned` says which are whole.

    Args:
        server: the ``UpdateServer`` that says who owns what.
    """

    settings: Plain
    partial = True  # this rank has the reduced gradients of what it owns only

    def __init__(self, collectives: Collectives, settings: Plain, options: Options, server: Any) -> None:
        super().__init__(collectives, settings, options)
        self.server = server
        self._sent = 0

    def _exchange(self, gradients: list[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        sent = [index for index, gradient in enumerate(gradients)
                if not isinstance(gradient, tf.IndexedSlices) and self.server.travels(variables[index])]
        self._sent = len(sent)
        home = {id(as_tf(variables[index])): index for index in sent}
        rest = [index for index in range(len(gradients)) if index not in set(sent)]
        reduced: list[Gradient] = list(gradients)
        everywhere = super()._exchange([gradients[index] for index in rest],
                                       [variables[index] for index in rest])
        for index, gradient in zip(rest, everywhere, strict=True):
            reduced[index] = gradient
        arrived = []
        for message in self.server.messages_of([variables[index] for index in sent]):
            own = [home[id(as_tf(self.server.served[piece.index]))]
                   for piece in message.parts[self.collectives.rank]]
            received = self._to_owners(message, [
                tf.reshape(gradients[home[id(as_tf(self.server.served[piece.index]))]], [-1])
                for piece in message.pieces])
            arrived.append(received)
            if not own:
                continue
            total = self._sum(received, tf.as_dtype(message.kind.dtype))
            parts = tf.split(total, [piece.numel for piece in message.parts[self.collectives.rank]])
            for index, part in zip(own, parts, strict=True):
                reduced[index] = tf.reshape(part, variables[index].shape)
        put_to_use(arrived, self.server.zero)  # also on a rank that owns nothing of them
        return reduced

    def _to_owners(self, message: Message, pieces: list[tf.Tensor]) -> tf.Tensor:
        """(M, own): every rank's gradients of what this rank owns."""
        flat = tf.concat(pieces, axis=0)
        if self.options.half and flat.dtype.is_floating:
            flat = tf.cast(flat, tf.float16)
        ranks, own = len(message.parts), message.splits[self.collectives.rank]
        received = self.collectives.alltoall(
            flat, message.splits, f"{self.prefix}/owners{self.server.label(message)}", rows=ranks * own)
        return tf.reshape(received, (ranks, own))

    def _sum(self, rows: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        """The reduced gradient of what this rank owns, (own,), added up in the order of the ranks."""
        wide, parts = accumulation_dtype(rows.dtype), tf.unstack(rows)
        total = tf.cast(parts[0], wide)
        for part in parts[1:]:
            total += tf.cast(part, wide)
        if self.settings.op == horovod.Average:
            total *= tf.cast(1.0 / len(parts), wide)
        return tf.cast(tf.cast(total, rows.dtype), dtype)

    def owned(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[bool]:
        """Of which variables this rank says what the reduced gradient is: each is one rank's."""
        return [self.server.owner(variable) == self.collectives.rank
                if self.server.travels(variable) and not isinstance(gradient, tf.IndexedSlices)
                else self.collectives.rank == 0
                for gradient, variable in zip(gradients, variables, strict=True)]

    def fingerprint(self) -> Fingerprint:
        cut = [f"message {message.index}: {message.splits}" for message in self.server.messages]
        return Fingerprint((*super().fingerprint().lines, *cut))

    def report(self) -> dict[str, Any]:
        return {**super().report(), "sent_to_owners": self._sent}

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

from hvd_ext.consistency.fingerprint import Fingerprint
from hvd_ext.reducers.options import DenseReduction, ReductionOptions
from hvd_ext.sharding import ShardedBucket
from hvd_ext.tensorflow.byte_counts import keep_alive_in_graph
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reducers.base import Gradient
from hvd_ext.tensorflow.reducers.kernels.delay_compensation import accumulation_dtype
from hvd_ext.tensorflow.reducers.plain import PlainReducer
from hvd_ext.tensorflow.sharding.shards import of_flat, put_back
from hvd_ext.tensorflow.variables import as_tf


class ShardedReducer(PlainReducer):
    """Sends gradients to their owners; sparse ones go the plain way.

    What is returned of what another rank owns is this rank's own gradient, of no use to anybody;
    :meth:`owned_gradients` says what is reduced.

    Args:
        server: the ``ShardedUpdater`` that says who owns what.
    """

    settings: DenseReduction
    owner_only = True
    saved_as = "PlainReducer"  # in checkpoints: it keeps nothing, and may take that one's place

    def __init__(self, collectives: Collectives, settings: DenseReduction, options: ReductionOptions,
                 server: Any) -> None:
        super().__init__(collectives, settings, options)
        self.server = server
        self._sent = 0

    def _exchange_gradients(self, gradients: list[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        sent = [index for index, gradient in enumerate(gradients)
                if not isinstance(gradient, tf.IndexedSlices) and self.server.has_message(variables[index])]
        self._sent = len(sent)
        home = {id(as_tf(variables[index])): index for index in sent}
        rest = sorted(set(range(len(gradients))) - set(sent))
        reduced: list[Gradient] = list(gradients)
        self._somewhere = {rest.index(index): some for index, some in self._somewhere.items()
                           if index in rest}
        everywhere = super()._exchange_gradients([gradients[index] for index in rest],
                                                 [variables[index] for index in rest])
        for index, gradient in zip(rest, everywhere, strict=True):
            reduced[index] = gradient
        arrived = []
        for message in self.server.messages_of([variables[index] for index in sent]):
            places = [home[id(as_tf(self.server.served[piece.index]))] for piece in message.pieces]
            received = self._to_owners(message, [of_flat(gradients[place], piece) for place, piece
                                                 in zip(places, message.pieces, strict=True)])
            arrived.append(received)
            own = message.parts[self.collectives.rank]
            if not own:
                continue
            total = self._sum_received(received, tf.as_dtype(message.kind.dtype))
            for piece, part in zip(own, tf.split(total, [piece.numel for piece in own]), strict=True):
                variable = self.server.served[piece.index]
                place = home[id(as_tf(variable))]
                reduced[place] = put_back(gradients[place], piece, part, tuple(variable.shape))
        keep_alive_in_graph(arrived, self.server.zero)  # also on a rank that owns nothing of them
        return reduced

    def _to_owners(self, message: ShardedBucket, pieces: list[tf.Tensor]) -> tf.Tensor:
        """(M, own): every rank's gradients of what this rank owns."""
        flat = tf.concat(pieces, axis=0)
        if self.options.half and flat.dtype.is_floating:
            flat = tf.cast(flat, tf.float16)
        ranks, own = len(message.parts), message.splits[self.collectives.rank]
        received = self.collectives.alltoall(
            flat, message.splits, f"{self.prefix}/owners{self.server.message_label(message)}",
            rows=ranks * own)
        return tf.reshape(received, (ranks, own))

    def _sum_received(self, rows: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        """The reduced gradient of what this rank owns, (own,), added up in the order of the ranks."""
        wide, parts = accumulation_dtype(rows.dtype), tf.unstack(rows)
        total = tf.cast(parts[0], wide)
        for part in parts[1:]:
            total += tf.cast(part, wide)
        if self.settings.op == horovod.Average:
            total *= tf.cast(1.0 / len(parts), wide)
        return tf.cast(tf.cast(total, rows.dtype), dtype)

    def owned_gradients(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[tf.Tensor | None]:
        """Of reduced gradients what this rank speaks for: what it owns, rank 0 for what all ranks have."""
        rank = self.collectives.rank
        found: list[tf.Tensor | None] = []
        for gradient, variable in zip(gradients, variables, strict=True):
            piece = self.server.stand_ins.shard_of(variable)
            if isinstance(gradient, tf.IndexedSlices):  # Keras' norm is of rows as they are, also equal ones
                found.append(gradient.values if rank == 0 else None)
            elif not self.server.has_message(variable):
                found.append(gradient if rank == 0 else None)
            elif piece is not None:
                found.append(of_flat(gradient, piece))
            else:
                found.append(gradient if self.server.owns_variable(variable) else None)
        return found

    def build_fingerprint(self) -> Fingerprint:
        cut = [f"message {message.index}: {message.splits}" for message in self.server.messages]
        return Fingerprint((*super().build_fingerprint().lines, *cut))

    def report(self) -> dict[str, Any]:
        return {**super().report(), "sent_to_owners": self._sent}

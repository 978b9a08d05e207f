"""Where the update runs: on every rank, on rank 0, or each variable's on the rank that owns it.

A rank makes the optimizer's variables (moments) only for what it owns; the updated weights are
broadcast by their owners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from hvd_ext import composition
from hvd_ext.servers import owners
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.variables import as_tf, name_of


class Server:
    """``server="rank0"`` or ``"sharded"`` of a distributed optimizer."""

    def __init__(self, kind: str, collectives: Collectives) -> None:
        if collectives.elastic:
            raise NotImplementedError(
                f"server={kind!r} cannot follow a change of the number of ranks in the TensorFlow "
                "front end; run without Horovod elastic, or leave server= out")
        self.kind = kind
        self.collectives = collectives
        self.owners: dict[int, int] = {}
        with tf.init_scope():
            self._used = tf.Variable(0.0, trainable=False)

    def build(self, variables: Sequence[Any]) -> None:
        """Give each variable an owner, the same on every rank."""
        numels = [int(tf.TensorShape(variable.shape).num_elements()) for variable in variables]
        assigned = owners(self.kind, numels, self.collectives.size)
        self.owners = {id(as_tf(variable)): owner
                       for variable, owner in zip(variables, assigned, strict=True)}

    def owns(self, variable: Any) -> bool:
        """Whether this rank keeps the variable's part of the optimizer's state."""
        return self.owner(variable) == self.collectives.rank

    def owner(self, variable: Any) -> int:
        """The rank that updates the variable."""
        return self.owners[id(as_tf(variable))]

    def update(self, update: Callable[[Sequence[Any], Sequence[Any]], None],
               gradients: Sequence[Any], variables: Sequence[Any], prefix: str) -> None:
        """``update(gradients, variables)`` of what this rank owns; then everyone's new weights."""
        mine = [(gradient, variable) for gradient, variable in zip(gradients, variables, strict=True)
                if self.owns(variable)]
        if mine:
            update([gradient for gradient, _ in mine], [variable for _, variable in mine])
        if self.collectives.size == 1:
            return
        self._use(gradient for gradient, variable in zip(gradients, variables, strict=True)
                  if not self.owns(variable))
        # All are under way together before the first one is waited for.
        sent = [self.collectives.broadcast(as_tf(variable).read_value(), self.owner(variable),
                                           f"{prefix}/weights/{name_of(variable)}")
                for variable in variables]
        for variable, value in zip(variables, sent, strict=True):
            as_tf(variable).assign(value)

    def _use(self, gradients: Iterable[Any]) -> None:
        """Put what others own to some use: TensorFlow leaves out reductions whose result has none,
        and the ranks that own it would wait for this one."""
        used = []
        for gradient in gradients:
            dense = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
            used.append(tf.reduce_sum(tf.cast(tf.reshape(dense, [-1])[:1], tf.float32)))
        if used:
            self._used.assign(tf.add_n(used))


def make_server(kind: str | None, optimizer: Any, collectives: Collectives) -> Server | None:
    """The server of a ``server=`` argument; None where every rank applies the update.

    Raises:
        ValueError: an unknown one, or an optimizer that has state already.
        NotImplementedError: one that keeps averages of all weights on each rank.
    """
    if kind in (None, "replicated"):
        return None
    composition.check(delay=False, topk=False, op_name="Average", predivide=1.0, server=kind,
                      multiple_evaluations=False)
    if optimizer.built:
        raise ValueError(f"server={kind!r} with an optimizer that has state already: make a new "
                         "one, or load the model with hvd.load_model(..., server=...)")
    if optimizer.use_ema:
        raise NotImplementedError(f"server={kind!r} with use_ema=True is not available in the "
                                  "TensorFlow front end; leave one of them out")
    return Server(kind, collectives)

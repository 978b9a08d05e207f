"""Where the update runs: on every rank, on rank 0, or each variable's on the rank that owns it.

A rank makes the optimizer's variables (moments, averages of weights) only for what it owns; the
updated weights are broadcast by their owners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from hvd_ext.servers import Server, owners, shares
from hvd_ext.servers.ownership import EVERY_RANK
from hvd_ext.tensorflow.collectives import Collectives, refuse_session_graphs
from hvd_ext.tensorflow.replies import EXACT, HELD, Replies, check_optimizer
from hvd_ext.tensorflow.traffic import Cell
from hvd_ext.tensorflow.uneven_data import EXTENDED
from hvd_ext.tensorflow.variables import as_tf
from hvd_ext.tensorflow.waiting import Waiting

SMALL_BYTES = 2**16  # weights of at most so many bytes travel together; larger ones are not copied


@dataclass(frozen=True)
class Message:
    """What one rank broadcasts: a large variable alone, or small ones and a status behind them.

    The status is an element that is not 0 where the rank's update failed.
    """

    owner: int
    dtype: tf.DType
    inside: list[Any]
    packed: bool

    @property
    def numels(self) -> list[int]:
        """Elements of what is packed, the status last."""
        return [*map(_numel, self.inside), 1]


class UpdateServer:
    """``server="rank0"`` or ``"sharded"`` of a distributed optimizer."""

    def __init__(self, settings: Server, collectives: Collectives) -> None:
        kind = settings.kind
        EXTENDED[self] = f"server={kind!r}"
        self.settings = settings
        self.kind = kind
        self.replies = None if settings.reply is None else Replies(settings, collectives)
        self.collectives = collectives
        self.owners: dict[int, int] = {}
        self.numels: dict[int, int] = {}
        self._zero = Cell(1)
        self._waiting = Waiting(f"the weights under server={kind!r}")
        self._functions: dict[tuple[Any, ...], Any] = {}
        self._planned_for: tuple[list[Any], set[int]] = [], set()

    def build(self, variables: Sequence[Any], local: set[int]) -> None:
        """Give each variable an owner, the same on every rank; ``local`` ones belong to every rank."""
        self._planned_for = list(variables), set(local)
        self._waiting.build()
        self._functions.clear()
        served = [variable for variable in variables if id(as_tf(variable)) not in local]
        numels = [int(tf.TensorShape(variable.shape).num_elements()) for variable in served]
        assigned = owners(self.kind, numels, self.collectives.size)
        self.owners = dict.fromkeys(local, EVERY_RANK)
        for variable, owner, numel in zip(served, assigned, numels, strict=True):
            self.owners[id(as_tf(variable))] = owner
            self.numels[id(as_tf(variable))] = numel
        if self.replies is not None:
            self.replies.plan(served, self.owner)

    def make_state(self, optimizer: Any, make: Callable[..., tf.Variable],
                   references: dict[int, tuple[Any, str]]) -> tf.Variable:
        """The optimizer's variables that belong to the server; returns the one for (rank, ranks)."""
        stamp = make((2,), "int64", "rank_and_ranks_of_server", True)
        if self.replies is not None:
            self.replies.build(optimizer, make, references, self.has_room)
        return stamp

    def replan(self) -> None:
        """Plan owners anew when the ranks have changed; none were planned before the optimizer is built."""
        self.build(*self._planned_for)

    def forget(self) -> None:
        """After an error: nothing is under way any more."""
        self._waiting.forget()

    def has_room(self, variable: Any) -> bool:
        """Whether this rank makes the variable's part of the state: under elastic it may own it later."""
        return self.collectives.elastic or self.owns(variable)

    def owns(self, variable: Any) -> bool:
        """Whether this rank keeps the variable's part of the optimizer's state."""
        return self.owner(variable) in (self.collectives.rank, EVERY_RANK)

    def owner(self, variable: Any) -> int:
        """The rank that updates the variable, or ``EVERY_RANK``."""
        return self.owners[id(as_tf(variable))]

    def update(self, update: Callable[[Sequence[Any], Sequence[Any]], None],
               gradients: Sequence[Any], variables: Sequence[Any], prefix: str) -> None:
        """``update(gradients, variables)`` of what this rank owns; then everyone's new weights.

        Raises:
            RuntimeError: the update failed on another rank (InvalidArgumentError in a traced
                function). The rank where it failed raises its own error, or names it.
        """
        mine = [(gradient, variable) for gradient, variable in zip(gradients, variables, strict=True)
                if self.owns(variable)]
        failure, replies, before = None, self.replies, {}
        if replies is not None and not replies.active:
            replies.land()
            replies = None
        try:
            if replies is not None:
                before = replies.begin()
            if mine:
                update([gradient for gradient, _ in mine], [variable for _, variable in mine])
        except Exception as error:  # the others wait for this rank's weights: tell them
            if self.collectives.size == 1:
                raise
            failure = error
        if self.collectives.size > 1:
            self._use([gradient for gradient, variable in zip(gradients, variables, strict=True)
                       if failure is not None or not self.owns(variable)])
            self.send(variables, f"{prefix}/weights", failure,
                      [] if replies is None else replies.outgoing(before, failure is not None))

    def _use(self, gradients: Sequence[Any]) -> None:
        """Put gradients that are not applied here to some use: TensorFlow leaves out reductions
        whose result has none, and the ranks that own it would wait for this one."""
        if tf.executing_eagerly():
            return
        seen = [gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
                for gradient in gradients]
        # A control dependency is not enough: TensorFlow drops those on operations without effects.
        tf.raw_ops.Assert(condition=tf.equal(self._zero.read()[0], 0), summarize=1,
                          data=[tf.reshape(value, [-1])[:1] for value in seen] or [[0]])

    def send(self, variables: Sequence[Any], name: str, failure: Exception | None = None,
             replies: Sequence[tuple[int, tf.Tensor]] = ()) -> None:
        """Give every rank the owners' values of variables. A collective.

        Args:
            variables: the same on every rank.
            name: prefix of the names in the timeline.
            failure: what went wrong with those that this rank owns.
            replies: owners and their compressed messages, in place of the variables that these are of.
        """
        rank = self.collectives.rank
        if self.collectives.size == 1:
            return
        plan = self._messages([one for one in variables if not (replies and self.replies.carries(one))]
                              if self.replies is not None else variables)
        given = [self._outgoing(message, failure is not None) for message in plan]
        sent = self._sent([*(message.owner for message in plan), *(owner for owner, _ in replies)],
                          [*given, *(message for _, message in replies)], name)
        sent, replied = sent[:len(plan)], sent[len(plan):]
        statuses = [(message.owner, value[-1]) for message, value in zip(plan, sent, strict=True)
                    if message.packed]
        if self.replies is not None and replied:
            statuses += self.replies.statuses(replied)
        self._raise_failure(statuses, [*sent, *replied], failure)
        if self.replies is not None and replied:
            self.replies.apply(replied)
        for message, value in zip(plan, sent, strict=True):
            if message.owner == rank and message.packed:
                continue  # one that is alone is assigned here too: without a use it would not be sent
            pieces = tf.split(value, message.numels)[:-1] if message.packed else [value]
            for variable, piece in zip(message.inside, pieces, strict=True):
                as_tf(variable).assign(tf.reshape(piece, variable.shape))

    def _sent(self, senders: list[int], given: list[tf.Tensor], name: str) -> list[tf.Tensor]:
        """What the owners gave; all messages are under way together before the first is waited for."""
        def send(given: list[tf.Tensor]) -> list[tf.Tensor]:
            begun = self._waiting.begin(given)
            with self.collectives.traffic.section():
                sent = [self.collectives.broadcast(value, owner, f"{name}/{number}")
                        for number, (owner, value) in enumerate(zip(senders, given, strict=True))]
            self._waiting.end(begun, sent)
            return sent

        if not tf.executing_eagerly():
            return send(given)
        key = (name, *senders)  # in a graph also here: outside of one collectives have no names
        if key not in self._functions:
            self._functions[key] = tf.function(send, autograph=False)
        return list(self._functions[key](given))

    def _messages(self, variables: Sequence[Any]) -> list[Message]:
        """Every owner's messages, in the same order on all ranks."""
        plan: list[Message] = []
        served = [variable for variable in variables if self.owner(variable) != EVERY_RANK]
        for owner in sorted({self.owner(variable) for variable in served}):
            packed: dict[tf.DType, Message] = {}
            for variable in served:
                dtype = as_tf(variable).dtype
                if self.owner(variable) != owner:
                    continue
                if _numel(variable) * dtype.size > SMALL_BYTES:
                    plan.append(Message(owner, dtype, [variable], False))
                else:
                    packed.setdefault(dtype, Message(owner, dtype, [], True)).inside.append(variable)
            plan += packed.values() or [Message(owner, tf.float32, [], True)]
        return plan

    def _outgoing(self, message: Message, failed: bool) -> tf.Tensor:
        """The message's tensor; of no value yet where another rank sends it."""
        if message.owner != self.collectives.rank:
            shape = [sum(message.numels)] if message.packed else message.inside[0].shape
            return tf.raw_ops.Empty(shape=shape, dtype=message.dtype, init=False)
        values = [as_tf(variable).read_value() for variable in message.inside]
        if not message.packed:
            return values[0]
        # Read, not constant: TensorFlow works out what depends on constants alone only once.
        status = tf.cast(self._zero.read() + int(failed), message.dtype)
        return tf.concat([*(tf.reshape(value, [-1]) for value in values), status], axis=0)

    def _raise_failure(self, packed: list[tuple[int, tf.Tensor]], sent: list[tf.Tensor],
                       failure: Exception | None) -> None:
        if tf.executing_eagerly():
            if failure is not None:
                raise failure
            failed = [owner for owner, status in packed if bool(status != 0)]
            if failed:
                raise RuntimeError(f"the update failed on rank {failed[0]} (server={self.kind!r}); "
                                   "see that rank's error")
            return
        with tf.control_dependencies(sent):  # an error must not stop a message that others wait for
            statuses = tf.stack([tf.cast(status, tf.float32) for _, status in packed])
        here = "" if failure is None else f" Here: {type(failure).__name__}: {failure}."
        tf.debugging.Assert(tf.reduce_all(tf.equal(statuses, 0.0)), [
            f"the update failed on a rank (server={self.kind!r}); see that rank's error.{here} "
            f"Status of ranks {[owner for owner, _ in packed]}:", statuses])

    def report(self, kept: Sequence[tf.Variable]) -> dict[str, Any]:
        """Where the update runs, and what of it this rank keeps; ``kept`` is its state."""
        numels = [self.numels[key] for key in self.numels]
        held = shares([self.owners[key] for key in self.numels], numels, self.collectives.size)
        return {
            "where": self.kind,
            "owned_elements": held[self.collectives.rank],
            "elements": sum(numels),
            "largest_share": max(held, default=0),
            **state_bytes(kept),
            **({} if self.replies is None else {"reply": self.replies.report()}),
        }


def server_report(server: UpdateServer | None, where: str, optimizer: Any,
                  references: dict[int, tuple[Any, str]], variables: Sequence[Any]) -> dict[str, Any]:
    """Figures of ``server=``; ``references`` are those of the optimizer's variables, ``variables`` the
    model's."""
    held = [as_tf(one) for one in optimizer.variables
            if references.get(id(as_tf(one)), (None, EXACT))[1] not in (EXACT, HELD)]
    if server is not None:
        return server.report(held)
    elements = sum(map(_numel, variables))
    return {"where": where, "owned_elements": elements, "elements": elements, "largest_share": elements,
            **state_bytes(held)}


def state_bytes(kept: Sequence[tf.Variable]) -> dict[str, int]:
    """Bytes of a rank's state, and of buffers that live between steps, of which there are none."""
    return {"state_bytes": sum(int(v.shape.num_elements()) * v.dtype.size for v in kept),
            "buffer_bytes": 0}


def _numel(variable: Any) -> int:
    return int(tf.TensorShape(variable.shape).num_elements())


def make_server(server: Server | None, optimizer: Any, collectives: Collectives) -> UpdateServer | None:
    """The server of a ``server=`` argument; None where every rank applies the update.

    Raises:
        ValueError: an optimizer that has state already.
        NotImplementedError: an optimizer that compressed replies cannot serve.
    """
    if server is None or server.kind == "replicated":
        return None
    kind = server.kind
    refuse_session_graphs(f"server={kind!r}")
    check_optimizer(server, optimizer)
    if optimizer.built:
        raise ValueError(f"server={kind!r} with an optimizer that has state already: make a new "
                         "one, or load the model with hvd.load_model(..., server=...)")
    return UpdateServer(server, collectives)

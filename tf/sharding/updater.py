"""Where the update runs: on every rank, on rank 0, or each variable's on the rank that owns it.

A rank makes the optimizer's variables (moments, averages of weights) only for what it owns; the
updated weights go from their owners to all ranks.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hvd_ext.reducers.buckets import BucketKey, TensorSpec, check_message, plan_buckets, split_groups
from hvd_ext.sharding import (
    Server,
    ShardedBucket,
    by_owner,
    cut_evenly,
    elements_by_rank,
    owned_elements,
    plan_owners,
)
from hvd_ext.sharding.ownership import EVERY_RANK
from hvd_ext.tensorflow.belonging import ONCE
from hvd_ext.tensorflow.byte_counts import ScratchVariable, keep_alive_in_graph
from hvd_ext.tensorflow.collectives import Collectives, refuse_session_graphs
from hvd_ext.tensorflow.graph_watchdog import GraphWaitProbe
from hvd_ext.tensorflow.sharding.downlink import EXACT, HELD, CompressedDownlink, check_optimizer
from hvd_ext.tensorflow.sharding.shards import ProxyVariables, cuts_variables, numel_of, unit_of, update_cost
from hvd_ext.tensorflow.sharding.weight_sync import Broadcast, Gathered, Status, plan_broadcasts
from hvd_ext.tensorflow.uneven_data import JOIN_BLOCKERS
from hvd_ext.tensorflow.variables import as_tf, name_of

ADVICE = ("see that rank's error; where it has none, the update made weights that are not finite: lower the "
          "learning rate, or clip gradients")


class ShardedUpdater:
    """``server="rank0"`` or ``"sharded"`` of a distributed optimizer.

    Args:
        settings: of the server.
        collectives: the ranks.
        cost: what owners are balanced by, of a variable.
        cut: whether they own pieces of variables, of equal size.
        groups: Horovod's ``groups=``: which variables share a message under "sharded".
    """

    def __init__(self, settings: Server, collectives: Collectives, cost: Callable[[Any], int],
                 cut: bool, groups: Any = None) -> None:
        kind = settings.kind
        JOIN_BLOCKERS[self] = f"server={kind!r}"
        self.settings = settings
        self.kind = kind
        self.replies = None if settings.downlink is None else CompressedDownlink(settings, collectives)
        self.collectives = collectives
        self.owners: dict[int, int] = {}
        self.numels: dict[int, int] = {}
        self.served: list[Any] = []
        self.messages: list[ShardedBucket] = []  # under "sharded", of served variables by number
        self.zero = ScratchVariable(1)
        self.stand_ins = ProxyVariables()
        self._cost = cost
        self._cut = cut
        self._groups = groups
        self._numbers: dict[int, int] = {}  # of variables that have a place in a message
        self._waiting = GraphWaitProbe(f"the weights under server={kind!r}")
        self._functions: dict[tuple[Any, ...], Any] = {}
        self._planned_for: tuple[list[Any], set[int]] = [], set()

    def plan_owners(self, variables: Sequence[Any], local: set[int]) -> None:
        """Give each variable an owner, the same on every rank; ``local`` ones belong to every rank."""
        self._planned_for = list(variables), set(local)
        self._waiting.create_variables()
        self._functions.clear()
        served = [variable for variable in variables if id(as_tf(variable)) not in local]
        assigned = plan_owners(self.kind, [self._cost(variable) for variable in served],
                               self.collectives.size)
        self.owners = dict.fromkeys(local, EVERY_RANK)
        for variable, owner in zip(served, assigned, strict=True):
            self.owners[id(as_tf(variable))] = owner
            self.numels[id(as_tf(variable))] = numel_of(variable)
        self._plan_messages(served, assigned)
        if self.replies is not None:
            self.replies.plan_buckets(served, self.owner_of)

    def _plan_messages(self, served: Sequence[Any], assigned: Sequence[int]) -> None:
        """Under "sharded": the buckets that gradients go to owners in, and weights come back in."""
        self.served, self.messages, self._numbers, self.stand_ins = list(served), [], {}, ProxyVariables()
        if self.kind != "sharded":
            return
        specs = [TensorSpec(name_of(one), tuple(one.shape), as_tf(one).dtype.size,
                            BucketKey(as_tf(one).dtype.name)) for one in served]
        empty = {number for number, spec in enumerate(specs) if not spec.numel}
        units = {number: unit_of(spec.shape) for number, spec in enumerate(specs) if len(spec.shape) == 2}
        groups = split_groups(self._groups, served, key=lambda one: id(as_tf(one)))
        for bucket in plan_buckets(specs, groups=groups):
            check_message(bucket, specs, 'server="sharded"')
            ranks = self.collectives.size
            message = (cut_evenly(bucket, ranks, units) if self._cut else
                       by_owner(bucket, dict(enumerate(assigned)), ranks)).without_tensors(empty)
            if not message.numel:
                continue
            self.messages.append(message)
            for rank, part in enumerate(message.parts):
                for piece in part:
                    variable = served[piece.index]
                    self._numbers[id(as_tf(variable))] = piece.index
                    self.owners[id(as_tf(variable))] = rank
                    if rank == self.collectives.rank and piece.numel < numel_of(variable):
                        self.stand_ins.make_proxy(variable, piece)

    def has_message(self, variable: Any) -> bool:
        """Whether the variable has a place in a message of "sharded"."""
        return id(as_tf(variable)) in self._numbers

    def messages_of(self, variables: Sequence[Any]) -> list[ShardedBucket]:
        """The messages, without what is not among ``variables``."""
        given = {id(as_tf(variable)) for variable in variables}
        left_out = {number for key, number in self._numbers.items() if key not in given}
        messages = [message.without_tensors(left_out) for message in self.messages]
        return [message for message in messages if message.numel]

    def message_label(self, message: ShardedBucket) -> str:
        """The message's part of its collective's name: ranks that leave out others do not meet."""
        if message in self.messages:
            return str(message.index)
        inside = ",".join(str(piece.index) for piece in message.pieces)
        return f"{message.index}.{zlib.crc32(inside.encode()):08x}"

    def make_state(self, optimizer: Any, make: Callable[..., tf.Variable],
                   references: dict[int, tuple[Any, str]]) -> tf.Variable:
        """The optimizer's variables that belong to the server; returns the one for (rank, ranks)."""
        stamp = make((2,), "int64", "rank_and_ranks_of_server", True)
        if self.replies is not None:
            self.replies.create_state(optimizer, make, references, self.has_room)
        return stamp

    def rebuild_for_world_size(self) -> None:
        """Plan owners anew when the ranks have changed; none were planned before the optimizer is built."""
        self.plan_owners(*self._planned_for)

    def abort_step(self) -> None:
        """After an error: nothing is under way any more."""
        self._waiting.reset_waits()

    def has_room(self, variable: Any) -> bool:
        """Whether this rank makes the variable's part of the state: under elastic it may own it later."""
        return self.collectives.is_elastic or self.owns_variable(variable)

    def owns_variable(self, variable: Any) -> bool:
        """Whether this rank keeps the variable's part of the optimizer's state, or a piece of it."""
        return (self.owner_of(variable) in (self.collectives.rank, EVERY_RANK)
                or self.stand_ins.proxy_of(variable) is not None)

    def owner_of(self, variable: Any) -> int:
        """The rank that updates the variable, of one that is cut its last piece, or ``EVERY_RANK``."""
        return self.owners[id(as_tf(variable))]

    @property
    def saved_as(self) -> str:
        """What files say of it."""
        return str(self.kind) if self.replies is None else f"{self.kind} with compressed replies"

    @property
    def busy(self) -> list[int]:
        """The ranks that update something, at least one."""
        if EVERY_RANK in self.owners.values():
            return list(range(self.collectives.size))
        elements = elements_by_rank(self.messages, self.collectives.size)
        return [rank for rank, owned in enumerate(elements) if owned] or [0]

    def is_cut(self, variable: Any) -> bool:
        """Whether several ranks own pieces of the variable."""
        number = self._numbers.get(id(as_tf(variable)))
        return self._cut and number is not None and sum(
            piece.index == number for message in self.messages for piece in message.pieces) > 1

    def update_owned(self, update: Callable[[Sequence[Any], Sequence[Any]], None],
                     gradients: Sequence[Any], variables: Sequence[Any], prefix: str) -> None:
        """``update_owned(gradients, variables)`` of what this rank owns; then everyone's new weights.

        Raises:
            RuntimeError: the update failed on another rank (InvalidArgumentError in a traced
                function). The rank where it failed raises its own error, or names it.
        """
        mine = [(gradient, variable) for gradient, variable in zip(gradients, variables, strict=True)
                if self.owns_variable(variable)]
        failure, replies, before = None, self.replies, {}
        if replies is not None and not replies.active:
            replies.apply_local()
            replies = None
        try:
            if replies is not None:
                before = replies.begin_update()
            mine = [self.stand_ins.shard_view(gradient, variable) for gradient, variable in mine]
            if mine:
                update([gradient for gradient, _ in mine], [variable for _, variable in mine])
        except Exception as error:  # the others wait for this rank's weights: tell them
            if self.collectives.size == 1:
                raise
            failure = error
        if self.collectives.size > 1:
            # TensorFlow leaves out reductions whose result has no use, and the owners would wait.
            keep_alive_in_graph([gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
                                 for gradient, variable in zip(gradients, variables, strict=True)
                                 if failure is not None or not self.owns_variable(variable)], self.zero)
            self.send_weights(variables, f"{prefix}/weights", failure,
                              [] if replies is None else replies.build_messages(before, failure is not None))

    def send_weights(self, variables: Sequence[Any], name: str, failure: Exception | None = None,
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

        def status(dtype: tf.DType) -> tf.Tensor:
            # Read, not constant: TensorFlow works out what depends on constants alone only once.
            return tf.reshape(tf.cast(self.zero.read() + int(failure is not None), dtype), (1,))

        plan = self._plan_of([one for one in variables if not (replies and self.replies.is_compressed(one))]
                             if self.replies is not None else variables)
        ways = {f"{name}/{self._name_of(number, message)}": message.start_send
                for number, message in enumerate(plan)}
        ways |= {f"{name}/reply{number}": _broadcast_from(owner)
                 for number, (owner, _) in enumerate(replies)}
        sent = self._send_messages(ways, [*(message.build_message(rank, status) for message in plan),
                                          *(message for _, message in replies)])
        sent, replied = sent[:len(plan)], sent[len(plan):]
        statuses = [status for message, value in zip(plan, sent, strict=True)
                    for status in message.read_statuses(value)]
        if self.replies is not None and replied:
            statuses += self.replies.read_statuses(replied)
        self._raise_failure(statuses, [*sent, *replied], failure)
        if self.replies is not None and replied:
            self.replies.apply_replies(replied)
        for message, value in zip(plan, sent, strict=True):
            message.assign_weights(value, rank)

    def _plan_of(self, variables: Sequence[Any]) -> list[Broadcast] | list[Gathered]:
        """The messages that bring the weights of variables, the same on every rank."""
        if self.kind == "sharded":
            return [Gathered(message, self.served, self.stand_ins) for message in self.messages_of(variables)]
        return plan_broadcasts([one for one in variables if self.owner_of(one) != EVERY_RANK], self.owner_of)

    def _name_of(self, number: int, message: Broadcast | Gathered) -> str:
        return self.message_label(message.message) if isinstance(message, Gathered) else str(number)

    def _send_messages(self, ways: dict[str, Callable[..., tf.Tensor]],
                       given: list[tf.Tensor]) -> list[tf.Tensor]:
        """What the owners gave; all messages are under way together before the first is waited for."""
        def send(given: list[tf.Tensor]) -> list[tf.Tensor]:
            begun = self._waiting.start_wait(given)
            with self.collectives.traffic.count_section():
                sent = [way(value, self.collectives, name)
                        for (name, way), value in zip(ways.items(), given, strict=True)]
            self._waiting.end_wait(begun, sent)
            return sent

        if not tf.executing_eagerly():
            return send(given)
        key = tuple(ways)  # in a graph also here: outside of one collectives have no names
        if key not in self._functions:
            self._functions[key] = tf.function(send, autograph=False)
        return list(self._functions[key](given))

    def _raise_failure(self, packed: list[Status], sent: list[tf.Tensor],
                       failure: Exception | None) -> None:
        if tf.executing_eagerly():
            if failure is not None:
                raise failure
            failed = [owner for owner, status in packed if bool(status != 0)]
            if failed:
                raise RuntimeError(f"the update failed on rank {failed[0]} (server={self.kind!r}); {ADVICE}")
            return
        with tf.control_dependencies(sent):  # an error must not stop a message that others wait for
            statuses = tf.stack([tf.cast(status, tf.float32) for _, status in packed])
        here = "" if failure is None else f" Here: {type(failure).__name__}: {failure}."
        tf.debugging.Assert(tf.reduce_all(tf.equal(statuses, 0.0)), [
            f"the update failed on a rank (server={self.kind!r}); {ADVICE}.{here} "
            f"Status of ranks {[owner for owner, _ in packed]}:", statuses])

    def report(self, kept: Sequence[tf.Variable]) -> dict[str, Any]:
        """Where the update runs, and what of it this rank keeps; ``kept`` is its state."""
        numels = [self.numels[key] for key in self.numels]
        owned = elements_by_rank(self.messages,
                                 self.collectives.size) if self.kind == "sharded" else owned_elements(
            [self.owners[key] for key in self.numels], numels, self.collectives.size)
        return {
            "where": self.kind,
            "owned_elements": owned[self.collectives.rank],
            "elements": sum(numels),
            "largest_share": max(owned, default=0),
            **state_bytes(kept),
            **({} if self.replies is None else {"downlink": self.replies.report()}),
        }


def server_report(server: ShardedUpdater | None, where: str, optimizer: Any,
                  references: dict[int, tuple[Any, str]], variables: Sequence[Any]) -> dict[str, Any]:
    """Figures of ``server=``; ``references`` are those of the optimizer's variables, ``variables`` the
    model's."""
    held = [as_tf(one) for one in optimizer.variables
            if references.get(id(as_tf(one)), (None, ONCE))[1] not in (EXACT, HELD, ONCE)]
    if server is not None:
        return server.report(held)
    elements = sum(map(numel_of, variables))
    return {"where": where, "owned_elements": elements, "elements": elements, "largest_share": elements,
            **state_bytes(held)}


def state_bytes(kept: Sequence[tf.Variable]) -> dict[str, int]:
    """Bytes of a rank's state, and of buffers that live between steps, of which there are none."""
    return {"state_bytes": sum(int(v.shape.num_elements()) * v.dtype.size for v in kept),
            "buffer_bytes": 0}


def _broadcast_from(owner: int) -> Callable[[tf.Tensor, Collectives, str], tf.Tensor]:
    """Sends what an owner gives."""
    return lambda given, collectives, name: collectives.broadcast(given, owner, name)


def make_server(server: Server | None, optimizer: Any, collectives: Collectives,
                groups: Any = None) -> ShardedUpdater | None:
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
    return ShardedUpdater(server, collectives, functools.partial(update_cost, optimizer),
                          cuts_variables(server, optimizer, collectives), groups)

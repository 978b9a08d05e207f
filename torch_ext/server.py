"""Where the wrapped optimizer's update runs: on every rank, on rank 0, or on parameters' owners.

The owner of a parameter, or of a piece of one, runs the wrapped optimizer's own update on it, so that only
the owner ever has its moments, and the new weights go to all ranks (SPARS-AMS Algorithm 1, lines 5 and 16).
An owner needs the reduced gradient of what it owns only; see ``reducers/sharded.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hvd_ext import checks
from hvd_ext.buckets import DEFAULT_BUCKET_BYTES, Kind, TensorSpec, plan_buckets, split_groups
from hvd_ext.composition import SERVERS
from hvd_ext.servers import (
    Message,
    OwnedState,
    Piece,
    assign,
    by_owner,
    check_loadable,
    cut_evenly,
    held,
)
from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.pieces import cut_state, flattened, is_elementwise, join_states, put_back, update_cost

STATUS_WORDS = 1  # behind an owner's weights: whether its update failed

def make_server(where: str) -> UpdateServer:
    """The server of ``server=``.

    Raises:
        ValueError: it is none of "rank0", "replicated", "sharded".
    """
    return UpdateServer(checks.choice("server", where, SERVERS))


class UpdateServer:
    """Runs the update where it belongs and brings the weights to all ranks.

    Args:
        where: "replicated": every rank updates every parameter. "rank0": rank 0 updates all. "sharded":
            every rank updates what it owns, with an elementwise optimizer an equal slice of each bucket,
            with any other whole parameters, balanced by bytes (Muon: by the cost of orthogonalising).
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._forget_plan()

    def _forget_plan(self) -> None:
        self.messages: list[Message] = []
        self.parameters: list[torch.Tensor] = []
        self._loads: list[int] = []
        self._home: dict[int, Message] = {}  # of each parameter, by its number
        self._pieces: dict[int, Piece] = {}  # this rank's of them
        self._weights: dict[int, torch.Tensor] = {}  # of a message, behind them the status
        self._gathered: dict[int, torch.Tensor] = {}

    def attach(self, collectives: Collectives, optimizer: torch.optim.Optimizer,
               groups: Any = None) -> None:
        """Serve ``optimizer`` over the ranks of ``collectives``; called again when these have changed.

        ``groups`` is Horovod's ``groups=``: which parameters share a message under "sharded".
        """
        self.collectives = collectives
        self._forget_plan()
        self._optimizer = weakref.ref(optimizer)
        self._groups = groups
        self._label = "server"
        self._wrapped = type(optimizer).__bases__[-1]  # the class that was extended
        self.plan()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that is served; it owns this object."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    @property
    def alone(self) -> bool:
        """Whether every rank updates everything by itself."""
        return (self.where == "replicated" or not self.collectives.included
                or self.collectives.size == 1)

    def refuse_closure(self) -> None:
        """Called when ``step(closure)`` was.

        Raises:
            ValueError: the update does not run on all ranks, which a closure would need.
        """
        if not self.alone:
            raise ValueError(
                f"step(closure) cannot be used with server={self.where!r}: only the owner of "
                "a parameter runs the update, while every rank would have to run the closure; call "
                "loss.backward() and then step(), or use server='replicated'"
            )

    # Who owns what

    def plan(self) -> None:
        """Give parameters that are new an owner and a place in a message."""
        known = {id(parameter) for parameter in self.parameters}
        fresh = [parameter for group in self.optimizer.param_groups for parameter in group["params"]
                 if id(parameter) not in known]
        if not fresh or self.alone:
            return
        ranks, base, first = self.collectives.size, len(self.parameters), len(self.messages)
        self.parameters += fresh
        self._loads = self._loads or [0] * ranks
        costs = [update_cost(self._wrapped, p) for p in fresh]
        owners = [0] * len(fresh) if self.where == "rank0" else assign(costs, ranks, self._loads)
        for owner, cost in zip(owners, costs, strict=True):
            self._loads[owner] += cost
        specs = [TensorSpec(str(i), tuple(p.shape), p.element_size(), Kind(str(p.dtype), str(p.device)))
                 for i, p in enumerate(fresh)]
        cut = self.where == "sharded" and is_elementwise(self._wrapped)
        for bucket in plan_buckets(specs, bucket_bytes=DEFAULT_BUCKET_BYTES,
                                   groups=split_groups(self._groups, fresh)):
            message = (cut_evenly(bucket, ranks) if cut
                       else by_owner(bucket, dict(enumerate(owners)), ranks))
            if message.numel:
                self.messages.append(message.moved(len(self.messages), base))
        for message in self.messages[first:]:
            self._home.update({piece.index: message for piece in message.pieces})
            self._pieces.update({piece.index: piece for piece in message.parts[self.collectives.rank]})
        for i, parameter in enumerate(fresh):  # what travels in no message is owned too
            if not parameter.numel() and owners[i] == self.collectives.rank:
                self._pieces[base + i] = Piece(base + i, 0, 0, 0)
        self._drop_state_of_others()

    def is_whole(self, piece: Piece) -> bool:
        """Whether it is all of its parameter."""
        return piece.numel == self.parameters[piece.index].numel()

    def _drop_state_of_others(self) -> None:
        """Keep the state of what this rank owns; some optimizers make it on construction."""
        for number, parameter in enumerate(self.parameters):
            state = self.optimizer.state.get(parameter)
            if not state:
                continue
            piece = self._pieces.get(number)
            if piece is None:
                del self.optimizer.state[parameter]
            elif not self.is_whole(piece):
                self.optimizer.state[parameter] = cut_state(state, parameter.shape, piece.start, piece.stop)

    # The step

    def step(self, inner_step: Callable[[], Any]) -> Any:
        """Run the wrapped optimizer's update where it belongs; every rank has the weights after.

        Returns:
            What ``inner_step`` returned, None on a rank that owns nothing.

        Raises:
            RuntimeError: the update failed on another rank. The rank where it failed raises its
                own error.
        """
        if self.alone:
            return inner_step()
        self.plan()
        result, failure = None, None
        if self._pieces:
            try:
                with self._only_owned():
                    result = inner_step()
            except Exception as error:
                failure = error
        failed = self._send_weights(failure is not None)
        if failure is not None:
            raise failure
        if failed:
            raise RuntimeError(f"the update failed on rank {failed[0]} (server={self.where!r}); "
                               "see that rank's error")
        return result

    @contextmanager
    def _only_owned(self) -> Iterator[None]:
        """Show the wrapped optimizer what this rank owns, and nothing else.

        A parameter owned in part is stood in for by a 1-D tensor of these elements, with their gradient
        and state; its memory is the message's that will carry them.
        """
        numbers = {id(p): number for number, p in enumerate(self.parameters)}
        state, groups = self.optimizer.state, self.optimizer.param_groups
        whole = [group["params"] for group in groups]
        standing: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for group in groups:
                shown = []
                for parameter in group["params"]:
                    piece = self._pieces.get(numbers[id(parameter)])
                    if piece is None:
                        continue
                    if self.is_whole(piece):
                        shown.append(parameter)
                        continue
                    stand_in = self._stand_in(parameter, piece)
                    standing.append((parameter, stand_in))
                    if parameter in state:
                        state[stand_in] = state.pop(parameter)
                    shown.append(stand_in)
                group["params"] = shown
            yield
        finally:
            for group, parameters in zip(groups, whole, strict=True):
                group["params"] = parameters
            for parameter, stand_in in standing:
                if stand_in in state:
                    state[parameter] = state.pop(stand_in)

    @torch.no_grad()
    def _stand_in(self, parameter: torch.Tensor, piece: Piece) -> torch.nn.Parameter:
        message = self._home[piece.index]
        begin = sum(message.splits[:self.collectives.rank])
        own = self._memory(message)
        place = own[piece.offset - begin : piece.offset - begin + piece.numel]
        place.copy_(flattened(parameter)[piece.start : piece.stop])
        stand_in = torch.nn.Parameter(place, requires_grad=parameter.requires_grad)
        if parameter.grad is not None:
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            stand_in.grad = flattened(gradient)[piece.start : piece.stop]
        return stand_in

    @torch.no_grad()
    def _send_weights(self, failed: bool) -> list[int]:
        """Bring each owner's weights to all ranks; the owners whose update failed."""
        started = [self._start(message, failed) for message in self.messages]
        failures: set[int] = set()
        for message, handle in zip(self.messages, started, strict=True):
            received, end = handle.wait(), 0
            if self.where == "rank0":
                received = self._memory(message)
            flats: dict[int, torch.Tensor] = {}
            for rank, pieces in enumerate(message.parts[:1] if self.where == "rank0" else message.parts):
                end += message.splits[rank] + STATUS_WORDS
                if received[end - STATUS_WORDS] != 0:
                    failures.add(rank)
                    continue
                for piece in pieces:
                    if rank == self.collectives.rank and self.is_whole(piece):
                        continue
                    flat = flats.setdefault(piece.index, flattened(self.parameters[piece.index]))
                    at = piece.offset + rank * STATUS_WORDS
                    flat[piece.start : piece.stop] = received[at : at + piece.numel]
            for number, flat in flats.items():
                put_back(self.parameters[number], flat)
        return sorted(failures)

    def _start(self, message: Message, failed: bool) -> Handle:
        rank, flat = self.collectives.rank, self._memory(message)
        begin = sum(message.splits[:rank])
        for piece in message.parts[rank]:
            if self.is_whole(piece):  # another one was updated in this memory
                at = piece.offset - begin
                flat[at : at + piece.numel] = flattened(self.parameters[piece.index])
        flat[-1] = float(failed)
        name = f"{self._label}/bucket{message.index}"
        if self.where == "rank0":
            return self.collectives.broadcast_async_(flat, 0, name, kind="weights")
        memory = self._gathered.setdefault(message.index, flat.new_empty(0))
        return self.collectives.allgather_async(flat, name, kind="weights", out=memory)

    def _memory(self, message: Message) -> torch.Tensor:
        """For what this rank owns of the weights of a message, under "rank0" for all of them."""
        if message.index not in self._weights:
            like = self.parameters[message.pieces[0].index]
            numel = message.numel if self.where == "rank0" else message.splits[self.collectives.rank]
            self._weights[message.index] = torch.zeros(numel + STATUS_WORDS, dtype=like.dtype,
                                                       device=like.device)
        return self._weights[message.index]

    # State

    def state_dict(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The wrapped optimizer's state as this rank holds it, and the mark that says what it is.

        No collective: it may be called on one rank only. Under "rank0" it is complete on rank 0,
        under "sharded" nowhere; see :meth:`gather`.
        """
        return state, self._shard().to_dict()

    def gather(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The complete state, on every rank; a collective, to be called by all of them."""
        rank, size = self.collectives.rank, self.collectives.size
        mark = OwnedState(self.where, rank, size, None).to_dict()
        if self.alone:
            return state, mark
        self.plan()
        numbers = self._numbers()
        whole = dict(state["state"])
        for number, parameter in enumerate(self.parameters):
            saved, piece = numbers[id(parameter)], self._pieces.get(number)
            mine = None if piece is None else (piece.start, state["state"].get(saved))
            everyone = self.collectives.allgather_object(mine, f"{self._label}/state")
            found = sorted((one for one in everyone if one is not None and one[1] is not None),
                           key=lambda one: one[0])
            if found:
                whole[saved] = join_states([one for _, one in found], parameter.shape)
        return {**state, "state": whole}, mark

    def load_state_dict(self, state: dict[str, Any],
                        saved: dict[str, Any] | None) -> dict[str, Any]:
        """What of a saved state this rank is to hold.

        Args:
            state: of the wrapped optimizer, saved under any server or without one.
            saved: the mark that :meth:`state_dict` gave with it, or None.

        Raises:
            ValueError: it lacks the state of a parameter that this rank owns.
        """
        mark = None if saved is None else OwnedState.from_dict(saved)
        if self.alone:
            check_loadable(mark, self._shard())
            return state
        self.plan()
        check_loadable(mark, OwnedState.from_dict({**self._shard().to_dict(), **self._owned()}))
        numbers, kept = self._numbers(), {}
        for number, piece in self._pieces.items():
            parameter = self.parameters[number]
            key = numbers[id(parameter)]
            found = state["state"].get(key)
            if found is None:
                continue
            inside = None if mark is None else mark.range_of(key)
            if inside is not None:
                found = cut_state(found, (inside[1] - inside[0],), piece.start - inside[0],
                                  piece.stop - inside[0])
            elif not self.is_whole(piece):
                found = cut_state(found, parameter.shape, piece.start, piece.stop)
            kept[key] = found
        return {**state, "state": kept}

    def broadcast_settings(self, root: int) -> None:
        """Give every rank the parameter groups' settings (learning rate, ...) of rank ``root``.

        Moments stay where they are owned; each rank loads its own.

        Raises:
            ValueError: on every rank, when some owners have state and others have none.
        """
        self.plan()
        filled = [bool(self.optimizer.state.get(self.parameters[number])) for number in self._pieces]
        settings = [{key: value for key, value in group.items() if key != "params"}
                    for group in self.optimizer.param_groups]
        everyone = self.collectives.allgather_object((any(filled) if filled else None, settings),
                                                     f"{self._label}/settings")
        if len({has for has, _ in everyone if has is not None}) > 1:
            raise ValueError(
                f"under server={self.where!r} some ranks have optimizer state and others have "
                "none; call load_state_dict() with the checkpoint on every rank, then broadcast"
            )
        for group, values in zip(self.optimizer.param_groups, everyone[root][1], strict=True):
            group.update(values)

    def _numbers(self) -> dict[int, int]:
        """The number of each parameter in ``state_dict()["param_groups"]``."""
        every = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {id(parameter): number for number, parameter in enumerate(every)}

    def _shard(self) -> OwnedState:
        rank, size = self.collectives.rank, self.collectives.size
        if self.alone or (self.where == "rank0" and rank == 0):
            return OwnedState(self.where, rank, size, None)
        return OwnedState.from_dict({"server": self.where, "rank": rank, "size": size, **self._owned()})

    def _owned(self) -> dict[str, Any]:
        numbers = self._numbers()
        mine = {numbers[id(self.parameters[number])]: piece for number, piece in self._pieces.items()}
        return {"owned": tuple(sorted(mine)),
                "cut": tuple((number, piece.start, piece.stop) for number, piece in sorted(mine.items())
                             if not self.is_whole(piece))}

    def report(self) -> dict[str, Any]:
        """Where the update runs, and what of it this rank keeps."""
        every = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        ranks = self.collectives.size
        owned = [every] * ranks if self.alone else held(self.messages, ranks)
        memory = [*self._weights.values(), *self._gathered.values()]
        return {
            "where": self.where,
            "owned_elements": owned[self.collectives.rank],
            "elements": every,
            "largest_share": max(owned, default=0),
            "state_bytes": sum(
                value.numel() * value.element_size()
                for state in self.optimizer.state.values() for value in state.values()
                if isinstance(value, torch.Tensor)
            ),
            "buffer_bytes": sum(t.numel() * t.element_size() for t in memory),
        }

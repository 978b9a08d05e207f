"""Where the wrapped optimizer's update runs: on every rank, on rank 0, or on parameters' owners.

The owner of a parameter, or of a piece of one, runs the wrapped optimizer's own update on it, so that only
the owner ever has its moments, and the new weights go to all ranks (SPARS-AMS Algorithm 1, lines 5 and 16).
An owner needs the reduced gradient of what it owns only; see ``reducers/sharded.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hvd_ext.reducers.buckets import DEFAULT_BUCKET_BYTES, BucketKey, TensorSpec, plan_buckets, split_groups
from hvd_ext.sharding import (
    OwnedState,
    Server,
    Shard,
    ShardedBucket,
    assign_owners,
    by_owner,
    check_loadable,
    cut_evenly,
    elements_by_rank,
    settings_of,
)
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.sharding import sharded_state
from hvd_ext.torch.sharding.downlink import CompressedDownlink
from hvd_ext.torch.sharding.shards import cut_state, flatten_view, is_elementwise, update_cost
from hvd_ext.torch.sharding.weight_sync import DenseWeightSync


def make_server(server: str | Server) -> ShardedUpdater:
    """The server of ``server=``.

    Raises:
        ValueError: it is none of "rank0", "replicated", "sharded".
    """
    return ShardedUpdater(settings_of(server))


class ShardedUpdater:
    """Runs the update where it belongs and brings the weights to all ranks.

    Args:
        settings: their kind is "replicated": every rank updates every parameter. "rank0": rank 0 updates
            all. "sharded": every rank updates what it owns, with an elementwise optimizer an equal slice of
            each bucket, with any other whole parameters, balanced by bytes (Muon: by the cost of
            orthogonalising). With a reply the new weights come back as ``replies.py`` says.
    """

    def __init__(self, settings: Server) -> None:
        self.settings = settings
        self.where = settings.kind
        self.replies = None if settings.downlink is None else CompressedDownlink(settings,
                                                                                 lambda: self.parameters)
        self._forget_plan()

    def _forget_plan(self) -> None:
        self.messages: list[ShardedBucket] = []
        self.parameters: list[torch.Tensor] = []
        self._loads: list[int] = []
        self._home: dict[int, ShardedBucket] = {}  # of each parameter, by its number
        self.pieces: dict[int, Shard] = {}  # this rank's of them
        self.whole_weights = DenseWeightSync(self.where, lambda: self.parameters)

    def attach_optimizer(self, collectives: Collectives, optimizer: torch.optim.Optimizer,
                         groups: Any = None, names: Mapping[torch.Tensor, str] | None = None) -> None:
        """Serve ``optimizer`` over the ranks of ``collectives``; called again when these have changed.

        ``groups`` is Horovod's ``groups=``: which parameters share a message under "sharded". ``names`` are
        the parameters'.
        """
        self.collectives = collectives
        self._forget_plan()
        self._optimizer = weakref.ref(optimizer)
        self._groups = groups
        self._names = {} if names is None else names
        self.whole_weights.collectives = collectives
        if self.replies is not None:
            self.replies.attach_collectives(collectives)
        self._wrapped = type(optimizer).__bases__[-1]  # the class that was extended
        self.plan_owners()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that is served; it owns this object."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    @property
    def alone(self) -> bool:
        """Whether every rank updates everything by itself."""
        return (self.where == "replicated" or not self.collectives.is_member
                or self.collectives.size == 1)

    # Who owns what

    def plan_owners(self) -> None:
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
        owners = [0] * len(fresh) if self.where == "rank0" else assign_owners(costs, ranks, self._loads)
        for owner, cost in zip(owners, costs, strict=True):
            self._loads[owner] += cost
        specs = [TensorSpec(str(i), tuple(p.shape), p.element_size(),
                            BucketKey(str(p.dtype), str(p.device), route=route))
                 for i, (p, route) in enumerate(zip(fresh, self._routes_of(fresh), strict=True))]
        cut = self.where == "sharded" and is_elementwise(self._wrapped)
        for bucket in plan_buckets(specs, bucket_bytes=DEFAULT_BUCKET_BYTES,
                                   groups=split_groups(self._groups, fresh)):
            message = (cut_evenly(bucket, ranks) if cut
                       else by_owner(bucket, dict(enumerate(owners)), ranks))
            if message.numel:
                self.messages.append(message.renumbered(len(self.messages), base))
        for message in self.messages[first:]:
            self._home.update({piece.index: message for piece in message.pieces})
            self.pieces.update({piece.index: piece for piece in message.parts[self.collectives.rank]})
        for i, parameter in enumerate(fresh):  # what travels in no message is owned too
            if not parameter.numel() and owners[i] == self.collectives.rank:
                self.pieces[base + i] = Shard(base + i, 0, 0, 0)
        if self.replies is not None:
            self.replies.plan_messages(self.messages[first:])
        self._drop_state_of_others()

    def _routes_of(self, fresh: Sequence[torch.Tensor]) -> list[str | None]:
        """How the new weights of parameters travel."""
        if self.replies is None:
            return [None] * len(fresh)
        names = [self._names.get(parameter, "") for parameter in fresh]
        if len(fresh) == len(self.parameters):
            self.replies.check_names(names)
        return [self.replies.route_weights(name, p) for name, p in zip(names, fresh, strict=True)]

    def is_whole(self, piece: Shard) -> bool:
        """Whether it is all of its parameter."""
        return piece.numel == self.parameters[piece.index].numel()

    def _drop_state_of_others(self) -> None:
        """Keep the state of what this rank owns; some optimizers make it on construction."""
        for number, parameter in enumerate(self.parameters):
            state = self.optimizer.state.get(parameter)
            if not state:
                continue
            piece = self.pieces.get(number)
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
            if self.replies is not None:
                self.replies.apply_local()
            return inner_step()
        self.plan_owners()
        if self.replies is not None:
            self.replies.begin_update()
        result, failure = None, None
        if self.pieces:
            try:
                with self._restrict_to_shard():
                    result = inner_step()
            except Exception as error:
                failure = error
        failed, failure = self._send_weights(failure)
        if failure is not None:
            raise failure
        if failed:
            raise RuntimeError(f"the update failed on rank {failed[0]} (server={self.where!r}); "
                               "see that rank's error")
        return result

    @contextmanager
    def _restrict_to_shard(self) -> Iterator[None]:
        """Show the wrapped optimizer what this rank owns, and nothing else.

        A parameter owned in part is stood in for by a 1-D tensor of these elements, with their gradient
        and state; its memory is the message's that will carry them. Where replies are compressed the exact
        weights stand in for it.
        """
        numbers = {id(p): number for number, p in enumerate(self.parameters)}
        state, groups = self.optimizer.state, self.optimizer.param_groups
        whole = [group["params"] for group in groups]
        standing: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for group in groups:
                shown = []
                for parameter in group["params"]:
                    piece = self.pieces.get(numbers[id(parameter)])
                    if piece is None:
                        continue
                    stand_in = None if self.replies is None else self.replies.stand_in(piece)
                    if stand_in is not None:
                        stand_in.grad = self._shard_gradient(parameter, piece)
                    elif self.is_whole(piece):
                        shown.append(parameter)
                        continue
                    else:
                        stand_in = self._proxy_parameter(parameter, piece)
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
                stand_in.grad = None
                if stand_in in state:
                    state[parameter] = state.pop(stand_in)

    @torch.no_grad()
    def _proxy_parameter(self, parameter: torch.Tensor, piece: Shard) -> torch.nn.Parameter:
        message = self._home[piece.index]
        begin = sum(message.splits[:self.collectives.rank])
        own = self.whole_weights.message_buffer(message)
        place = own[piece.offset - begin : piece.offset - begin + piece.numel]
        place.copy_(flatten_view(parameter)[piece.start : piece.stop])
        stand_in = torch.nn.Parameter(place, requires_grad=parameter.requires_grad)
        stand_in.grad = self._shard_gradient(parameter, piece)
        return stand_in

    def _shard_gradient(self, parameter: torch.Tensor, piece: Shard) -> torch.Tensor | None:
        """The gradient of a piece: the parameter's own where that is all of it, else 1-D."""
        if parameter.grad is None or self.is_whole(piece):
            return parameter.grad
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        return flatten_view(gradient)[piece.start : piece.stop]

    @torch.no_grad()
    def _send_weights(self, failure: Exception | None) -> tuple[list[int], Exception | None]:
        """Bring each owner's weights to all ranks.

        Args:
            failure: what went wrong here with the update.

        Returns:
            The owners whose update failed, and what went wrong here with it or with what it gave.
        """
        started = []
        for message in self.messages:
            way = self._transport_for(message)
            handle, wrong = way.start_transfer(message, failure is not None)
            failure = failure or wrong
            started.append((way, message, handle))
        failures: set[int] = set()
        for way, message, handle in started:
            failures.update(way.finish_transfer(message, handle.wait()))
        if self.replies is not None:
            self.replies.mark_step_done()
        return sorted(failures), failure

    def _transport_for(self, message: ShardedBucket) -> DenseWeightSync | CompressedDownlink:
        carried = self.replies is not None and self.replies.is_compressed(message)
        return self.replies if carried else self.whole_weights  # type: ignore[return-value]

    # State

    def state_dict(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The wrapped optimizer's state as this rank holds it, and the mark that says what it is.

        No collective: it may be called on one rank only. Under "rank0" it is complete on rank 0,
        under "sharded" nowhere; see :meth:`gather_state`.
        """
        self.plan_owners()  # of parameters that were added since
        return state, {**sharded_state.held_state(self).to_dict(), **self._of_replies(gather=False)}

    def gather_state(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The complete state, on every rank; a collective, to be called by all of them."""
        mark = OwnedState(self.where, self.collectives.rank, self.collectives.size, None).to_dict()
        if not self.alone:
            self.plan_owners()
            state = sharded_state.gather_state(self, state)
        return state, {**mark, **self._of_replies(gather=True)}

    def check_state_dict(self, state: dict[str, Any], saved: dict[str, Any] | None) -> None:
        """Refuse what ``load_state_dict`` could not take, before anything is changed.

        Raises:
            ValueError: it lacks the state of a parameter that this rank owns, or has other replies.
        """
        mark = None if saved is None else OwnedState.from_dict(saved)
        if self.alone:
            check_loadable(mark, sharded_state.held_state(self))
            return
        self.plan_owners()
        check_loadable(mark, sharded_state.owned_state(self))
        if self.replies is not None:
            self.replies.check_state_dict((saved or {}).get("reply"), sharded_state.parameter_numbers(self))

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
        replied = (saved or {}).get("reply")
        if self.alone:
            check_loadable(mark, sharded_state.held_state(self))
            if self.replies is not None:
                self.replies.defer_until_local(replied, sharded_state.in_order(self))
            return state
        self.plan_owners()
        state = sharded_state.cut_to(self, state, mark)
        if self.replies is not None:
            self.replies.load_state_dict(replied, sharded_state.parameter_numbers(self))
        return state

    def _of_replies(self, *, gather: bool) -> dict[str, Any]:
        if self.replies is None or self.alone:
            return {}
        numbers = sharded_state.parameter_numbers(self)
        return {"reply": self.replies.gather_state(numbers) if gather else self.replies.state_dict(numbers)}

    def gather_exact(self) -> dict[int, torch.Tensor]:
        """The exact weights of what comes back compressed, 1-D, by the parameter's ``id``; a collective."""
        if self.replies is None or self.alone:
            return {}
        self.plan_owners()
        return {id(self.parameters[number]): flat for number, flat in self.replies.gather_exact().items()}

    @contextmanager
    def exact_weights(self) -> Iterator[None]:
        """Let the parameters hold the exact weights, where replies are compressed; a collective."""
        if self.replies is None:
            yield
        elif self.alone:
            self.replies.apply_local()
            yield
        else:
            self.plan_owners()
            with self.replies.exact_weights():
                yield

    def report(self) -> dict[str, Any]:
        """Where the update runs, and what of it this rank keeps."""
        every = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        ranks = self.collectives.size
        owned = [every] * ranks if self.alone else elements_by_rank(self.messages, ranks)
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
            "buffer_bytes": self.whole_weights.bytes_held(),
            **({} if self.replies is None else {"downlink": self.replies.report()}),
        }

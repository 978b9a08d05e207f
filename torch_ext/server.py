"""Where the wrapped optimizer's update runs: on every rank, on rank 0, or on parameters' owners.

Gradients are reduced and identical on all ranks when ``step`` is called. The owner of a parameter runs
the wrapped optimizer's own update on it, so that only the owner ever has its moments, and the new
weights go to all ranks (SPARS-AMS Algorithm 1, lines 5 and 16).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hvd_ext import checks
from hvd_ext.buckets import Bucket, Kind, TensorSpec, plan_buckets
from hvd_ext.composition import SERVERS
from hvd_ext.servers import OwnedState, check_loadable, owners, shares
from hvd_ext.servers.ownership import EVERY_RANK
from hvd_ext.torch.collectives import Collectives

WEIGHT_BUCKET_BYTES = 64 * 2**20
STATUS_WORDS = 1  # behind each bucket's weights: whether its owner's update failed


def make_server(where: str) -> UpdateServer:
    """The server of ``server=``.

    Raises:
        ValueError: it is none of "rank0", "replicated", "sharded".
    """
    return UpdateServer(checks.choice("server", where, SERVERS))


class UpdateServer:
    """Runs the update where it belongs and brings the weights to all ranks.

    Args:
        where: "replicated": every rank updates every parameter, nothing is sent. "rank0": rank 0
            updates all. "sharded": each parameter is updated by its owner; owners are balanced by
            the parameters' sizes.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._parameters: list[torch.Tensor] = []
        self._owners: list[int] = []
        self._buckets: list[tuple[int, Bucket]] = []
        self._buffers: dict[int, torch.Tensor] = {}

    def attach(self, collectives: Collectives, optimizer: torch.optim.Optimizer) -> None:
        """Serve ``optimizer`` over the ranks of ``collectives``; its parameters decide the owners."""
        self.collectives = collectives
        self._optimizer = weakref.ref(optimizer)
        self._label = "server"
        self._plan()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that is served; it owns this object."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    @property
    def alone(self) -> bool:
        """Whether every rank updates everything by itself."""
        return self.where == "replicated" or self.collectives.size == 1

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
        self._plan()
        result, failure = None, None
        if self.collectives.rank in self._owners:
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

    def _plan(self) -> None:
        """Give parameters that are new an owner and a place in a message."""
        known = {id(parameter) for parameter in self._parameters}
        fresh = [parameter for group in self.optimizer.param_groups for parameter in group["params"]
                 if id(parameter) not in known]
        if not fresh:
            return
        loads = shares(self._owners, [p.numel() for p in self._parameters], self.collectives.size)
        owned = owners(self.where, [p.numel() for p in fresh], self.collectives.size, loads)
        self._parameters += fresh
        self._owners += owned
        specs = [TensorSpec(str(i), tuple(p.shape), p.element_size(),
                            Kind(str(p.dtype), str(p.device), owner=owner))
                 for i, (p, owner) in enumerate(zip(self._parameters, self._owners, strict=True))]
        plan = plan_buckets(specs, bucket_bytes=WEIGHT_BUCKET_BYTES)
        self._buckets = [(bucket.kind.owner, bucket) for bucket in plan if bucket.numel]
        self._buffers = {}

    @contextmanager
    def _only_owned(self) -> Iterator[None]:
        """Hide the parameters of other owners from the wrapped optimizer."""
        mine = self._mine()
        groups = self.optimizer.param_groups
        whole = [group["params"] for group in groups]
        try:
            for group in groups:
                group["params"] = [p for p in group["params"] if id(p) in mine]
            yield
        finally:
            for group, parameters in zip(groups, whole, strict=True):
                group["params"] = parameters

    def _mine(self) -> set[int]:
        return {id(p) for p, owner in zip(self._parameters, self._owners, strict=True)
                if owner in (self.collectives.rank, EVERY_RANK)}

    @torch.no_grad()
    def _send_weights(self, failed: bool) -> list[int]:
        """Broadcast each owner's weights; the owners whose update failed."""
        started = []
        for owner, bucket in self._buckets:
            flat = self._buffer(bucket)
            if owner == self.collectives.rank:
                for slot in bucket.slots:
                    parameter = self._parameters[slot.index]
                    slot.of(flat).view(parameter.shape).copy_(parameter)
                flat[bucket.numel] = float(failed)
            name = f"{self._label}/rank{owner}/bucket{bucket.index}"
            started.append(self.collectives.broadcast_async_(flat, owner, name, kind="weights"))
        failures = []
        for (owner, bucket), handle in zip(self._buckets, started, strict=True):
            handle.wait()
            flat = self._buffer(bucket)
            if flat[bucket.numel] != 0:
                failures.append(owner)
            elif owner != self.collectives.rank:
                for slot in bucket.slots:
                    parameter = self._parameters[slot.index]
                    parameter.copy_(slot.of(flat).view(parameter.shape))
        return failures

    def _buffer(self, bucket: Bucket) -> torch.Tensor:
        if bucket.index not in self._buffers:
            like = self._parameters[bucket.slots[0].index]
            self._buffers[bucket.index] = torch.empty(
                bucket.numel + STATUS_WORDS, dtype=like.dtype, device=like.device
            )
        return self._buffers[bucket.index]

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
        self._plan()
        numbers = self._numbers()
        whole = dict(state["state"])
        for parameter, owner in zip(self._parameters, self._owners, strict=True):
            number = numbers[id(parameter)]
            piece = state["state"].get(number) if owner == rank else None
            found = self.collectives.allgather_object(piece, f"{self._label}/state")[owner]
            if found is not None:
                whole[number] = found
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
        if self.alone:
            check_loadable(None if saved is None else OwnedState.from_dict(saved), self._shard())
            return state
        self._plan()
        shard = self._shard()
        mine = self._mine()
        owned = {number for key, number in self._numbers().items() if key in mine}
        if saved is not None:
            check_loadable(OwnedState.from_dict(saved), OwnedState(shard.server, shard.rank, shard.size,
                                                         tuple(sorted(owned))))
        kept = {number: value for number, value in state["state"].items() if number in owned}
        return {**state, "state": kept}

    def broadcast_settings(self, root: int) -> None:
        """Give every rank the parameter groups' settings (learning rate, ...) of rank ``root``.

        Moments stay where they are owned; each rank loads its own.

        Raises:
            ValueError: on every rank, when some owners have state and others have none.
        """
        self._plan()
        mine = self._mine()
        held = [bool(self.optimizer.state.get(p)) for p in self._parameters if id(p) in mine]
        settings = [{key: value for key, value in group.items() if key != "params"}
                    for group in self.optimizer.param_groups]
        everyone = self.collectives.allgather_object((any(held) if held else None, settings),
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
        mine = self._mine()
        owned = tuple(sorted(n for key, n in self._numbers().items() if key in mine))
        return OwnedState(self.where, rank, size, owned)

    def report(self) -> dict[str, Any]:
        """Where the update runs, and what of it this rank keeps."""
        numels = [p.numel() for p in self._parameters]
        held = shares(self._owners, numels, self.collectives.size)
        return {
            "where": self.where,
            "owned_elements": held[self.collectives.rank],
            "elements": sum(numels),
            "largest_share": max(held, default=0),
            "state_bytes": sum(
                value.numel() * value.element_size()
                for state in self.optimizer.state.values() for value in state.values()
                if isinstance(value, torch.Tensor)
            ),
            "buffer_bytes": sum(b.numel() * b.element_size() for b in self._buffers.values()),
        }

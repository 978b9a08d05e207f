"""Plain reduction under ``server="sharded"``: each owner gets the sum of what it owns, for half the bytes.

An allreduce is a reduce-scatter and an allgather. Here an alltoall brings every rank's gradients of a
bucket to their owners, who add them up in the order of the ranks; the allgather that follows the
update brings weights (``server.py``). Each moves (M-1)/M of the bucket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import horovod.torch as horovod
import torch

from hvd_ext.consistency.fingerprint import Fingerprint
from hvd_ext.reducers.options import DenseReduction, ReductionOptions
from hvd_ext.sharding import Shard, ShardedBucket
from hvd_ext.step import ReducedGradients
from hvd_ext.torch.collectives import Collectives, Handle, keep_alive_until_done
from hvd_ext.torch.reducers.base import NamedParameter, Reducer
from hvd_ext.torch.reducers.frozen import ask_frozen, check_frozen
from hvd_ext.torch.reducers.kernels.delay_compensation import accumulation_dtype
from hvd_ext.torch.reducers.plain import PlainReducer
from hvd_ext.torch.sharding.shards import flatten_view, put_back


class ShardedReducer(Reducer):
    """Sends gradients to their owners; all of them everywhere only on :meth:`gather_gradients`.

    The first step of a parameter goes the plain way and shows whether its gradient is sparse; sparse
    gradients keep going that way. After ``finish()`` an owner's part of ``parameter.grad`` is reduced and
    the rest is this rank's own; after the update such a gradient is None.

    Args:
        server: the ``ShardedUpdater`` that says who owns what.
    """

    settings: DenseReduction
    STATE = ()
    saved_as = "PlainReducer"  # in checkpoints: it keeps nothing, and may take that one's place

    def __init__(self, collectives: Collectives, settings: DenseReduction, options: ReductionOptions,
                 server: Any) -> None:
        super().__init__(collectives, settings, options)
        self.server = server
        self._sparse: set[NamedParameter] = set()
        self._plain = PlainReducer(collectives, settings, options)
        self._forget_plan()

    def _forget_plan(self) -> None:
        self._messages: dict[int, ShardedBucket] = {}
        self._home: dict[NamedParameter, int] = {}  # the number of the message that an entry travels in
        self._pieces: dict[NamedParameter, list[Shard]] = {}
        self._members: dict[int, set[NamedParameter]] = {}
        self._names: dict[int, str] = {}
        self._filled: dict[int, set[NamedParameter]] = {}
        self._started: dict[int, Handle] = {}
        self._buffers: dict[int, torch.Tensor] = {}
        self._received: dict[int, torch.Tensor] = {}
        self._partial = False
        self._partly_reduced = ReducedGradients()

    @property
    def repeatable(self) -> bool:
        """Every rank must have all of a gradient before another one is added to it."""
        return not self._partial and self._plain.repeatable

    @property
    def name(self) -> str:
        return "server='sharded' after hvd.clip_grad_norm_" if self._partial else super().name

    # Planning

    def register_parameters(self, entries: Sequence[NamedParameter]) -> None:
        super().register_parameters(entries)
        self._plain.register_parameters([entry for entry in entries if entry not in self._home])

    def _plan_dense(self) -> None:
        """Let parameters whose gradients turned out to be dense go to their owners from now on."""
        for entry in self._plain.entries:
            gradient = entry.parameter.grad
            if gradient is not None and gradient.is_sparse and not self.options.sparse_as_dense:
                self._sparse.add(entry)
        self.server.plan_owners()
        numbers = {id(parameter): number for number, parameter in enumerate(self.server.parameters)}
        unseen = self.frozen.intersection(self._plain.entries)
        dense = {numbers[id(entry.parameter)]: entry for entry in self.entries
                 if entry not in self._sparse and entry not in unseen}
        left_out = set(range(len(numbers))) - dense.keys()
        self._forget_plan()
        for message in self.server.messages:
            message = message.without_tensors(left_out)
            for piece in message.pieces:
                entry = dense[piece.index]
                self._messages[message.index] = message
                self._home[entry] = message.index
                self._pieces.setdefault(entry, []).append(piece)
                self._members.setdefault(message.index, set()).add(entry)
        for entry in self.entries:
            if entry in self._home:
                self._names.setdefault(self._home[entry], entry.name)
        self._plain.register_parameters([entry for entry in self.entries if entry not in self._home])

    def _needs_plan(self) -> bool:
        """Whether a parameter can go to its owner from now on."""
        return not self.server.alone and any(entry not in self._sparse and entry not in self.frozen
                                             and entry.parameter.numel()
                                             for entry in self._plain.entries)

    def after_agreement(self) -> None:
        self._plain.after_agreement()

    def find_frozen(self, passes_done: Mapping[torch.Tensor, int]) -> None:
        super().find_frozen(passes_done)
        self._plain.frozen = self.frozen

    # During the backward pass

    def gradient_ready(self, entry: NamedParameter, passes_done: int, pass_number: int) -> None:
        if entry not in self._home:
            self._plain.gradient_ready(entry, passes_done, pass_number)
        elif passes_done == self.passes:
            self._fill_messages(entry)

    @torch.no_grad()
    def _fill_messages(self, entry: NamedParameter) -> None:
        """Put a gradient, or zeros, into its messages, and send those that are full."""
        parameter = entry.parameter
        gradient = torch.zeros_like(parameter) if parameter.grad is None else _to_dense(parameter.grad)
        parameter.grad = None if entry in self.frozen else self._as_taken(gradient)
        flat, index = flatten_view(gradient), self._home[entry]
        for piece in self._pieces[entry]:
            piece.slice_of(self._message_buffer(index)).copy_(flat[piece.start : piece.stop])
        filled = self._filled.setdefault(index, set())
        filled.add(entry)
        if len(filled) == len(self._members[index]):
            memory = self._received.setdefault(index, self._message_buffer(index).new_empty(0))
            self._started[index] = self.collectives.alltoall_async(
                self._message_buffer(index), self._messages[index].splits,
                self._collective_name(index, "owners"), out=memory)

    def _message_buffer(self, index: int) -> torch.Tensor:
        """The message's flat memory, in the dtype that travels."""
        if index not in self._buffers:
            message = self._messages[index]
            like = self.server.parameters[message.pieces[0].index]
            dtype = torch.float16 if self.options.half and like.is_floating_point() else like.dtype
            self._buffers[index] = torch.empty(message.numel, dtype=dtype, device=like.device)
        return self._buffers[index]

    def _collective_name(self, index: int, what: str) -> str:
        return f"sharded/{self._names[index]}/{what}"

    # At the end of the step

    @torch.no_grad()
    def finish(self) -> bool:
        asked = ask_frozen(self, "sharded/frozen") if self._messages else None
        for entry, index in self._home.items():
            if entry not in self._filled.get(index, ()):
                self._fill_messages(entry)
        received = {index: self._started[index].wait() for index in self._messages}
        if asked is not None:
            check_frozen(self, asked)
        for index, message in self._messages.items():
            own = self._sum_received(message, received[index])
            self._write_gradients(index, own, [self.collectives.rank])
        self._started, self._filled = {}, {}
        self._plain.finish()
        partial = bool(self._messages)
        if self._needs_plan():
            self._plan_dense()
        self._partial = partial
        self._partly_reduced.remember_gradients((entry, entry.parameter.grad) for entry in self._home)
        return True

    def _sum_received(self, message: ShardedBucket, received: torch.Tensor) -> torch.Tensor:
        """The reduced gradient of what this rank owns, (own,), added up in the order of the ranks."""
        rank, size = self.collectives.rank, self.collectives.size
        rows = received.view(size, message.splits[rank])
        wide = accumulation_dtype(received.dtype)
        total = rows[0] if received.dtype == wide else rows[0].to(wide)
        for row in rows[1:]:
            total.add_(row)
        if self.settings.op == horovod.Average:
            total.mul_(1.0 / size)
        return total.to(received.dtype)

    def _write_gradients(self, index: int, flat: torch.Tensor, ranks: Sequence[int]) -> None:
        """Write what some ranks own, one after another in ``flat``, into the parameters' gradients."""
        at = 0
        for rank in ranks:
            for piece in self._messages[index].parts[rank]:
                parameter = self.server.parameters[piece.index]
                if parameter.grad is not None:  # it is of a frozen parameter
                    gradient = _to_dense(parameter.grad)
                    memory = flatten_view(gradient)
                    memory[piece.start : piece.stop] = flat[at : at + piece.numel]
                    put_back(gradient, memory)
                    parameter.grad = self._as_taken(gradient)
                at += piece.numel

    def _as_taken(self, gradient: torch.Tensor) -> torch.Tensor:
        """A dense gradient in the layout that the optimizer takes."""
        return gradient.to_sparse(1) if self.options.sparse_only else gradient

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Bring the reduced gradients to all ranks: an allgather of what each owns."""
        if not self._partial:
            return
        started = {}
        for index, message in self._messages.items():
            own = self._owned_of(message)
            like = self._message_buffer(index)
            flat = torch.cat(own).to(like.dtype) if own else like.new_empty(0)
            started[index] = self.collectives.allgather_async(flat, self._collective_name(index, "complete"),
                                                              kind="gradients")
        for index, handle in started.items():
            self._write_gradients(index, handle.wait(), range(self.collectives.size))
        self._partial = False

    @property
    def owner_only(self) -> bool:
        """Whether this rank has the reduced gradients of what it owns only."""
        return self._partial

    def abandon(self) -> None:
        if self._partial:  # a backward pass may have made others
            for entry in self._home:
                if self._partly_reduced.includes_gradient(entry, entry.parameter.grad):
                    entry.parameter.grad = None
            self._partial = False

    def on_weights_updated(self) -> None:
        if self._partial:  # the gradient is now partly local, partly reduced: invalid, so drop it
            for entry in self._home:
                entry.parameter.grad = None
            self._partial = False

    def pending_handles(self) -> list[Handle]:
        return [*self._started.values(), *self._plain.pending_handles()]

    def abort_step(self) -> None:
        if self._started:
            keep_alive_until_done(self._started.values())
            self._started, self._buffers, self._received = {}, {}, {}
        self._filled = {}
        self._partial = False
        self._plain.abort_step()

    # The ranks, and figures

    def build_fingerprint(self) -> Fingerprint:
        cut = [f"message {m.index}: {m.splits}" for m in self.server.messages]
        return Fingerprint((*super().build_fingerprint().lines, *cut))

    def owned_gradients(self) -> list[torch.Tensor]:
        """The reduced gradients of what this rank owns; those that all ranks have are rank 0's."""
        mine = [one for message in self._messages.values() for one in self._owned_of(message)]
        if self.collectives.rank == 0:
            everywhere = [entry.parameter.grad for entry in self.entries if entry not in self._home]
            mine += [gradient for gradient in everywhere if gradient is not None]
        return mine

    def _owned_of(self, message: ShardedBucket) -> list[torch.Tensor]:
        """The reduced gradients of what this rank owns of a message; zeros of what is frozen."""
        pieces = message.parts[self.collectives.rank]
        parameters = [self.server.parameters[piece.index] for piece in pieces]
        return [p.new_zeros(piece.numel) if p.grad is None
                else flatten_view(_to_dense(p.grad))[piece.start : piece.stop]
                for piece, p in zip(pieces, parameters, strict=True)]

    def on_state_taken(self) -> None:
        """Owners may be others now, and a rank that joins has no plan: the next step goes the plain way."""
        self._sparse = set()
        self._forget_plan()
        self._plain.register_parameters(self.entries)

    def report(self) -> dict[str, Any]:
        held = sum(t.numel() * t.element_size() for t in (*self._buffers.values(), *self._received.values()))
        return {"sent_to_owners": len(self._home), "bytes_held": held}


def _to_dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient

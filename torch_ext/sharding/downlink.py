"""Compressed replies of a server: what an owner keeps and sends, and how all ranks apply it.

w - w^ -> compress -> send -> every rank, the owner too: w^ += what was sent
The parameters hold w^; ``exact`` is w of what this rank owns, which the wrapped optimizer updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hvd_ext.reducers.filters import check_names
from hvd_ext.reducers.topk.wire import MessageError
from hvd_ext.sharding import Server, Shard, ShardedBucket
from hvd_ext.sharding import downlink as replies
from hvd_ext.torch.collectives import Collectives, Handle, count_bytes
from hvd_ext.torch.reducers.base import norm_and_finite
from hvd_ext.torch.reducers.kernels.topk import wire_dtype
from hvd_ext.torch.sharding import downlink_kernels as kernels
from hvd_ext.torch.sharding.shards import flatten_view, is_still, put_back
from hvd_ext.torch.sharding.weight_sync import LABEL


@dataclass
class ExactShard:
    """w of a piece.

    Attributes:
        exact: w, of the parameter's dtype: of its shape where all of it is owned, else 1-D.
        held: elements ``start`` to ``stop`` of the flattened parameter and the sum of their bits after the
            last step; other bits now mean that somebody has set the weights.
    """

    exact: torch.nn.Parameter
    held: tuple[int, int, int]


class CompressedDownlink:
    """Compressed replies of one server.

    Args:
        settings: of the server; its ``downlink`` is not None.
        parameters: gives those that are served, by number.
    """

    def __init__(self, settings: Server, parameters: Callable[[], Sequence[torch.Tensor]]) -> None:
        self.settings = settings
        self._parameters = parameters
        self.steps = 0
        self._shown = False  # inside of ``exact_weights``
        self.forget_plan()

    def forget_plan(self) -> None:
        """Owners may be others from now on; w of all of them is the ranks' w^ until it is loaded."""
        self.messages: list[ShardedBucket] = []
        self._mine: dict[int, Shard] = {}
        self._kept: dict[int, ExactShard] = {}
        self._landing: list[tuple[torch.Tensor, Mapping[str, Any]]] = []  # loaded where nothing is sent
        self._scratch: dict[tuple[Any, Any], torch.Tensor] = {}
        self._received: dict[int, torch.Tensor] = {}
        self._sent = 0

    def attach_collectives(self, collectives: Collectives) -> None:
        """Reply to the ranks of ``collectives``; called again when these have changed."""
        self.collectives = collectives
        self.forget_plan()

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse patterns of ``exclude`` that match none of the parameters' names.

        Raises:
            ValueError: one matches none.
        """
        if not self.settings.half:
            check_names(self.settings.downlink.exclude, names)

    def route_weights(self, name: str, parameter: torch.Tensor) -> str | None:
        """How a parameter's new weights travel."""
        return replies.route_weights(self.settings, name, tuple(parameter.shape),
                                     str(parameter.dtype).removeprefix("torch."))

    def is_compressed(self, message: ShardedBucket) -> bool:
        """Whether the weights of a message come back compressed."""
        return message.kind.route == replies.REPLY

    def plan_messages(self, messages: Sequence[ShardedBucket]) -> None:
        """Take those of the server's messages that are new and come back compressed."""
        for message in messages:
            if self.is_compressed(message):
                self.messages.append(message)
                self._mine.update({piece.index: piece for piece in message.parts[self.collectives.rank]})

    def _shards_by_rank(self, message: ShardedBucket) -> list[tuple[Shard, ...]]:
        """The parts that are sent, by rank."""
        return list(message.parts[:1] if self.settings.kind == "rank0" else message.parts)

    # Around the update

    def begin_update(self) -> None:
        """Before an update.

        Raises:
            RuntimeError: the parameters hold w.
        """
        self._refuse_shown("step()")
        self._sent = 0
        self.detect_external_writes()

    def _refuse_shown(self, what: str) -> None:
        if self._shown:
            raise RuntimeError(f"{what} was called within optimizer.exact_weights(), where the parameters do "
                               "not hold the weights that gradients belong to; call it outside")

    def detect_external_writes(self) -> None:
        """Let w of parameters that have none, or whose weights were set since, be w^."""
        parameters, sums = self._parameters(), {}
        for number in self._mine:
            kept = self._kept.get(number)
            if kept is not None:
                start, stop, _ = kept.held
                sums[number] = kernels.bit_sum(flatten_view(parameters[number])[start:stop])
        now = dict(zip(sums, _read_numbers(list(sums.values())), strict=True))
        for number, piece in self._mine.items():
            if number not in now or now[number] != self._kept[number].held[2]:
                self._take_weights(number, piece)

    @torch.no_grad()
    def _take_weights(self, number: int, piece: Shard) -> None:
        """Let w of a piece be what the parameter holds."""
        parameter = self._parameters()[number]
        whole = piece.numel == parameter.numel()
        value = parameter if whole else flatten_view(parameter)[piece.start : piece.stop]
        if number in self._kept:
            self._kept[number].exact.copy_(value)
        else:
            exact = torch.nn.Parameter(value.detach().clone(), requires_grad=parameter.requires_grad)
            self._kept[number] = ExactShard(exact, (piece.start, piece.stop, 0))

    def stand_in(self, piece: Shard) -> torch.nn.Parameter | None:
        """What the wrapped optimizer updates in a parameter's place; None where it is the parameter."""
        return self._kept[piece.index].exact if piece.index in self._mine else None

    @torch.no_grad()
    def start_transfer(self, message: ShardedBucket, failed: bool) -> tuple[Handle, Exception | None]:
        """Send what this rank replies with; what is wrong with it, if anything is."""
        part = message.parts[self.collectives.rank]
        difference, failure = self._weight_difference(message, part), None
        if not failed and not norm_and_finite([difference])[1]:
            failure = FloatingPointError(
                "the update made weights that are not finite; lower the learning rate, or clip gradients")
        words = self._pack_reply(message,
                                 self._shards_by_rank(message)[0] if self.settings.kind == "rank0" else part,
                                 difference, failed or failure is not None)
        name = f"{LABEL}/bucket{message.index}"
        others = self.collectives.size - 1
        if self.settings.kind == "rank0":
            self._sent += others * count_bytes(words) if self.collectives.rank == 0 else 0
            return self.collectives.broadcast_async_(words, 0, name, kind="weights"), failure
        self._sent += others * count_bytes(words)
        memory = self._received.setdefault(message.index, words.new_empty(0))
        return self.collectives.allgather_async(words, name, kind="weights", out=memory), failure

    def _weight_difference(self, message: ShardedBucket, part: Sequence[Shard]) -> torch.Tensor:
        """w - w^ of what this rank owns of a message, 1-D; memory that the next message uses again."""
        parameters = self._parameters()
        like = parameters[message.pieces[0].index]
        dtype, numel = kernels.wide_dtype(like.dtype), sum(piece.numel for piece in part)
        memory = self._scratch.get((dtype, like.device))
        if memory is None or memory.numel() < numel:
            memory = self._scratch[dtype, like.device] = torch.empty(numel, dtype=dtype, device=like.device)
        difference, at = memory[:numel], 0
        for piece in part:
            held = flatten_view(parameters[piece.index])[piece.start : piece.stop]
            exact = held if is_still(parameters[piece.index]) else flatten_view(self._kept[piece.index].exact)
            kernels.weight_difference(exact, held, difference[at : at + piece.numel])
            at += piece.numel
        return difference

    def _pack_reply(self, message: ShardedBucket, part: Sequence[Shard], difference: torch.Tensor,
                    failed: bool) -> torch.Tensor:
        """This rank's message; under "rank0" on other ranks room for that of rank 0."""
        elsewhere = difference.numel() != sum(piece.numel for piece in part)
        if self.settings.half:
            given = difference.new_zeros(sum(p.numel for p in part)) if elsewhere else difference
            return kernels.pack_half(given, failed)
        reply = self.settings.downlink
        segments = self._reply_segments(part)
        layout = replies.message_layout(segments, reply.values)
        if failed or elsewhere:
            return kernels.failed_entries(layout, difference.device)
        seed = (reply.seed, self.steps, message.index, self.collectives.rank)
        return kernels.pack_entries(difference, segments, layout, reply, seed)

    def _reply_segments(self, part: Sequence[Shard]) -> Any:
        reply = self.settings.downlink
        return replies.part_segments(part, reply.ratio_at(self.steps), per_tensor=reply.per_tensor)

    @torch.no_grad()
    def finish_transfer(self, message: ShardedBucket, received: torch.Tensor) -> list[int]:
        """Add what the owners sent to w^; the ranks whose update failed."""
        add = self._add_half if self.settings.half else self._add_entries
        flats: dict[int, torch.Tensor] = {}

        def weights(piece: Shard) -> torch.Tensor:
            return flats.setdefault(piece.index, flatten_view(self._parameters()[piece.index]))

        failed = add(message, received, weights)
        for number, flat in flats.items():
            put_back(self._parameters()[number], flat)
        return failed

    def _add_entries(self, message: ShardedBucket, received: torch.Tensor,
                     weights: Callable[[Shard], torch.Tensor]) -> list[int]:
        reply, parts = self.settings.downlink, self._shards_by_rank(message)
        layouts = [replies.message_layout(self._reply_segments(part), reply.values) for part in parts]
        ends = [sum(one.words for one in layouts[: rank + 1]) for rank in range(len(layouts))]
        what = f"{LABEL}/bucket{message.index}"
        if received.numel() != ends[-1]:
            raise MessageError(f"{what}: the owners sent {received.numel()} words, expected {ends[-1]}; give "
                               "all ranks the same downlink=, also where its ratio is a function of the step")
        starts = [end - one.words for end, one in zip(ends, layouts, strict=True)]
        counts = replies.check_headers(kernels.read_headers(received, starts), layouts, what)
        for part, one, start, count in zip(parts, layouts, starts, counts, strict=True):
            if count > 0:
                for piece, positions, values in kernels.entries_of_pieces(
                        received[start : start + one.words], one, wire_dtype(reply), count, part):
                    kernels.add_entries(weights(piece), positions, values)
        return [rank for rank, count in enumerate(counts) if count == replies.FAILED]

    def _add_half(self, message: ShardedBucket, received: torch.Tensor,
                  weights: Callable[[Shard], torch.Tensor]) -> list[int]:
        failed, end = [], 0
        for rank, part in enumerate(self._shards_by_rank(message)):
            begin, end = end, end + sum(piece.numel for piece in part) + 1
            if received[end - 1] != 0:
                failed.append(rank)
                continue
            for piece in part:
                kernels.add_half(weights(piece)[piece.start : piece.stop],
                                 received[begin : begin + piece.numel])
                begin += piece.numel
        return failed

    def mark_step_done(self) -> None:
        """After the replies were applied: remember how this rank's pieces of w^ were left."""
        self.steps += 1
        parameters = self._parameters()
        sums = _read_numbers([kernels.bit_sum(flatten_view(parameters[number])[piece.start : piece.stop])
                              for number, piece in self._mine.items()])
        for (number, piece), bits in zip(self._mine.items(), sums, strict=True):
            self._kept[number].held = (piece.start, piece.stop, bits)

    # w on all ranks

    @torch.no_grad()
    def gather_exact(self) -> dict[int, torch.Tensor]:
        """w of every parameter that comes back compressed, 1-D, by number; a collective.

        Raises:
            RuntimeError: the parameters hold w.
        """
        self._refuse_shown("what needs the exact weights")
        self.detect_external_writes()
        found: dict[int, torch.Tensor] = {}
        for message, handle in [(message, self._start_gather(message)) for message in self.messages]:
            received, at = handle.wait(), 0
            for part in self._shards_by_rank(message):
                for piece in part:
                    parameter = self._parameters()[piece.index]
                    flat = found.setdefault(piece.index, parameter.detach().new_empty(parameter.numel()))
                    flat[piece.start : piece.stop] = received[at : at + piece.numel]
                    at += piece.numel
        return found

    def _start_gather(self, message: ShardedBucket) -> Handle:
        like = self._parameters()[message.pieces[0].index]
        own = [flatten_view(self._kept[piece.index].exact) for piece in message.parts[self.collectives.rank]]
        flat = torch.cat(own) if own else like.detach().new_empty(0)
        name = f"{LABEL}/exact{message.index}"
        if self.settings.kind == "rank0":
            room = flat if own else like.detach().new_empty(message.numel)
            return self.collectives.broadcast_async_(room, 0, name, kind="objects")
        return self.collectives.allgather_async(flat, name, kind="objects")

    @contextmanager
    def exact_weights(self) -> Iterator[None]:
        """Let the parameters hold w; w^ again after. A collective."""
        parameters = self._parameters()
        exact = self.gather_exact()
        held = {number: parameters[number].detach().clone() for number in exact}
        self._shown = True
        try:
            with torch.no_grad():
                for number, flat in exact.items():
                    parameters[number].copy_(flat.view(parameters[number].shape))
            yield
        finally:
            with torch.no_grad():
                for number, before in held.items():
                    parameters[number].copy_(before)
            self._shown = False

    # State; parameters are numbered as in ``state_dict()["param_groups"]``

    def state_dict(self, numbers: Mapping[int, int]) -> dict[str, Any]:
        """w of what this rank owns, and what tells whether the parameters hold its w^.

        Args:
            numbers: the number of each parameter, by its ``id``.
        """
        parameters, weights = self._parameters(), {}
        for number, kept in self._kept.items():
            piece = self._mine[number]
            weights[numbers[id(parameters[number])]] = {
                "exact": flatten_view(kept.exact).clone(), "range": (piece.start, piece.stop),
                "held": kept.held}
        return {"steps": self.steps, "weights": weights}

    def gather_state(self, numbers: Mapping[int, int]) -> dict[str, Any]:
        """As :meth:`state_dict`, of all ranks; a collective."""
        parameters, weights = self._parameters(), {}
        for number, exact in self.gather_exact().items():
            flat = flatten_view(parameters[number])
            bits = int(kernels.bit_sum(flat))
            weights[numbers[id(parameters[number])]] = {
                "exact": exact, "range": (0, exact.numel()), "held": (0, exact.numel(), bits)}
        return {"steps": self.steps, "weights": weights}

    def load_state_dict(self, saved: Mapping[str, Any] | None, numbers: Mapping[int, int]) -> None:
        """Take w of what this rank owns from what :meth:`state_dict` or :meth:`gather_state` gave.

        It counts once the parameters hold the weights that were saved with it; without it, and where they
        hold others, w is what the parameters hold at the next step.
        """
        self.check_state_dict(saved, numbers)
        self._kept, self.steps = {}, 0
        if saved is None:
            return
        parameters, self.steps = self._parameters(), saved["steps"]
        here = {numbers[id(parameter)]: number for number, parameter in enumerate(parameters)}
        for saved_number, entry in saved["weights"].items():
            number, (start, stop) = here[saved_number], entry["range"]
            piece = self._mine.get(number)
            if piece is None or not (start <= piece.start and piece.stop <= stop):
                continue
            self._take_weights(number, piece)
            kept = self._kept[number]
            flat = entry["exact"][piece.start - start : piece.stop - start]
            with torch.no_grad():
                kept.exact.copy_(flat.view(kept.exact.shape))
            kept.held = tuple(entry["held"])

    def check_state_dict(self, saved: Mapping[str, Any] | None, numbers: Mapping[int, int]) -> None:
        """Refuse weights that were compressed when they were saved and are sent whole here (ValueError)."""
        compressed = {numbers[id(self._parameters()[one.index])] for m in self.messages for one in m.pieces}
        for number in () if saved is None else saved["weights"]:
            if number not in compressed:
                raise ValueError(f"this state was saved with a reply that compressed parameter {number}, "
                                 "which is sent whole here; give Server the downlink= that it was saved with")

    def defer_until_local(self, saved: Mapping[str, Any] | None, parameters: Sequence[torch.Tensor]) -> None:
        """What was saved among several ranks is loaded by one that is alone: its parameters are to hold w."""
        self._landing = [] if saved is None else [
            (parameters[number], entry) for number, entry in saved["weights"].items()]

    @torch.no_grad()
    def apply_local(self) -> None:
        """Give the parameters w, where they hold the w^ that it was saved with."""
        for parameter, entry in self._landing:
            flat, (start, stop, bits) = flatten_view(parameter), entry["held"]
            if int(kernels.bit_sum(flat[start:stop])) == bits:
                flat.copy_(entry["exact"])
                put_back(parameter, flat)
        self._landing = []

    def report(self) -> dict[str, Any]:
        """Figures of this rank; the norm is of w - w^ of what it owns."""
        parameters = self._parameters()
        norms = [float(torch.linalg.vector_norm(
            flatten_view(kept.exact).double()
            - flatten_view(parameters[number])[self._mine[number].start : self._mine[number].stop].double()))
            for number, kept in self._kept.items()]
        how = {"compression": "fp16"} if self.settings.half else {
            "compression": "topk", "ratio": self.settings.downlink.ratio_at(self.steps)}
        return {**how, "bytes_sent": self._sent, "error_norm": math.hypot(*norms),
                "exact_bytes": sum(count_bytes(kept.exact) for kept in self._kept.values())}


def _read_numbers(sums: Sequence[torch.Tensor]) -> list[int]:
    """Their values, read from a device at once."""
    devices = {one.device for one in sums}
    if len(devices) > 1:
        return [int(one) for one in sums]
    return torch.stack(list(sums)).tolist() if sums else []

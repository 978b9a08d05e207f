"""Delay-compensated reduction at the price of an allreduce: slices out, recursion, slices back.

Of every bucket rank s receives slice s of every rank's gradient (alltoall, during the backward
pass); the ranks exchange the lengths of their steps, from which all derive the same order; each
runs the recursion on its slice, and the reduced slices are gathered. Out and back together move
``2 (M-1)/M`` of the bucket's bytes, what a ring allreduce moves.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from hvd_ext.buckets import Bucket, Kind, Slot, check_message, slice_sizes
from hvd_ext.delay.config import DelayCompensated
from hvd_ext.delay.slices import VirtualWorker, application_order, usable
from hvd_ext.options import Options
from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.reducers.base import Entry
from hvd_ext.torch.reducers.buckets import BucketReducer, Started
from hvd_ext.torch.reducers.delay_kernels import (
    Recursion,
    accumulation_dtype,
    compensated_sum,
    plain_sum,
    square_norm,
)

ABSENT = -1.0  # in place of a squared norm: this rank had no such micro-batch


class Sent(NamedTuple):
    """A bucket on its way: its squared norm, 0-D, and the alltoall, None on a single rank."""

    square: torch.Tensor
    handle: Handle | None


class DelayReducer(BucketReducer):
    """The reducer of ``op=hvd.DelayCompensated(...)``.

    With ``options.half`` float16 travels; the recursion runs in float32 (float64 for float64
    gradients) whatever travels.
    """

    settings: DelayCompensated

    def __init__(self, collectives: Collectives, settings: DelayCompensated,
                 options: Options) -> None:
        super().__init__(collectives, settings, options)
        self.unusable_steps = 0
        self.mean_square: dict[int, torch.Tensor] = {}
        self._ranks = collectives.size if collectives.included else 1
        self._receive: dict[tuple[int, int], torch.Tensor] = {}
        self._spare: dict[Entry, torch.Tensor] = {}
        self._present: set[int] = set()

    # Planning and filling

    def build(self, entries: Sequence[Entry]) -> None:
        super().build(entries)
        for bucket in self.buckets:
            check_message(bucket, self.specs, "DelayCompensated")

    @property
    def parts(self) -> int:
        return self.passes if self.settings.virtual_workers == "microbatch" else 1

    @property
    def linear(self) -> bool:
        return False

    @property
    def counts_active(self) -> bool:
        return True

    @property
    def _mean_of(self) -> int:
        """How many ranks the mean is over."""
        return self.active or self.collectives.size

    @property
    def _alone(self) -> bool:
        """One worker only: its gradient is the result."""
        return self.collectives.size * self.parts == 1

    @property
    def _keeps_own(self) -> bool:
        """Whether this rank's own slice does not pass through the alltoall.

        What is sent must lie in one piece, which it does without the first slice or the last.
        """
        return self.collectives.rank in (0, self.collectives.size - 1)

    def kind(self, entry: Entry) -> Kind:
        return replace(super().kind(entry), group=entry.group_index)  # the groups' rates may differ

    def buffer_dtype(self, bucket: Bucket) -> torch.dtype:
        return torch.float16 if self.options.half else super().buffer_dtype(bucket)

    def gradient_ready(self, entry: Entry, passes_done: int, pass_number: int) -> None:
        self._present.add(pass_number - 1 if self.parts > 1 else 0)
        if not self._alone:
            super().gradient_ready(entry, passes_done, pass_number)

    def fill(self, entry: Entry, bucket: Bucket, slot: Slot, part: int) -> None:
        super().fill(entry, bucket, slot, part)
        if entry.parameter.grad is not None:
            self._present.add(part)
            if self.parts > 1:
                # The next micro-batch is a worker of its own; its memory is kept for the result.
                self._spare.setdefault(entry, entry.parameter.grad)
                entry.parameter.grad = None

    def start(self, bucket: Bucket, part: int, flat: torch.Tensor) -> Sent:
        if self.collectives.size == 1:
            return Sent(square_norm(flat), None)
        name = f"{self.prefix}/bucket{bucket.index}" + (f"/part{part}" if part else "")
        memory = self._receive.setdefault((bucket.index, part), flat.new_empty(0))
        splits = slice_sizes(bucket.numel, self.collectives.size)
        sent = flat
        if self._keeps_own:
            own, splits[self.collectives.rank] = splits[self.collectives.rank], 0
            sent = flat[own:] if self.collectives.rank == 0 else flat[:bucket.numel - own]
        return Sent(square_norm(flat),
                    self.collectives.alltoall_async(sent, splits, name, out=memory))

    # At the end of the step

    def start_all(self) -> None:
        if not self._alone:
            super().start_all()

    def finish(self) -> bool:
        self._check_ranks()
        if self._alone:
            self.forget()
            return True
        return super().finish()

    def complete(self, started: Started) -> tuple[list[torch.Tensor], bool]:
        workers = self._workers(started)
        good = usable(workers)
        order = application_order(workers, self.settings.order if good else "rank")
        gathering = [self._reduce_slice(bucket, started, order, good) for bucket in self.buckets]
        reduced = [one.wait() if isinstance(one, Handle) else one for one in gathering]
        for entry, gradient in self._spare.items():
            if entry.parameter.grad is None:
                entry.parameter.grad = gradient
        self.steps += good
        self.unusable_steps += not good
        return reduced, True  # gradients that are not finite reach every rank as their plain mean

    def _workers(self, started: Started) -> list[VirtualWorker]:
        """All ranks' virtual workers of this step, with the squared lengths of their steps."""
        lrs = {bucket.index: self._lr(bucket) for bucket in self.buckets}
        keys = sorted(started)
        norms = torch.stack([started[key].square.double().cpu() for key in keys]).tolist() if keys else []
        squares = [0.0] * self.parts
        for (index, part), norm in zip(keys, norms, strict=True):
            squares[part] += lrs[index] ** 2 * norm
        if self.parts > 1 or self.absent:
            squares = [s if part in self._present else ABSENT for part, s in enumerate(squares)]
        rates = [lrs[index] for index in sorted(lrs)]
        rows = self.agree([*rates, *squares])
        if any(row[:len(rates)] != rows[0][:len(rates)] for row in rows):
            by_rank = [tuple(dict.fromkeys(row[:len(rates)])) for row in rows]
            raise self.disagree(
                "the ranks' learning rates differ at this step, which DelayCompensated needs to be the "
                f"same: {by_rank} by rank. Give every rank the same schedule, and load the same checkpoint")
        return [VirtualWorker(rank, part, square) for rank, row in enumerate(rows)
                for part, square in enumerate(row[len(rates):]) if square != ABSENT]

    def _reduce_slice(self, bucket: Bucket, started: Started, order: list[VirtualWorker],
                      good: bool) -> Handle | torch.Tensor:
        """Reduce this rank's slice of a bucket and start gathering it."""
        ranks = self.collectives.size
        if ranks > 1:
            rank, sizes = self.collectives.rank, slice_sizes(bucket.numel, ranks)
            slices = []  # by part and rank
            for part in range(self.parts):
                received = started[bucket.index, part].handle.wait()
                rows = list(received.view(ranks - self._keeps_own, sizes[rank]).unbind())
                if self._keeps_own:
                    rows.insert(rank, self.buffer(bucket, part).split(sizes)[rank])
                slices.append(rows)
            # What was sent has arrived: its memory serves for the result.
            out = self.buffer(bucket).split(sizes)[rank]
        else:
            slices = [[self.buffer(bucket, part)] for part in range(self.parts)]
            out = self._receive.setdefault((bucket.index, 0), torch.empty_like(slices[0][0]))
        rows = [slices[w.part][w.rank] for w in order]
        if not rows:
            out.zero_()
        elif good:
            compensated_sum(rows, self._recursion(bucket), self._mean_square(bucket, out), out)
        else:
            plain_sum(rows, out, self._mean_of)
        if ranks == 1:
            return out
        return self.collectives.allgather_async(
            out, f"{self.prefix}/bucket{bucket.index}/reduced", out=self._receive[bucket.index, 0])

    def _lr(self, bucket: Bucket) -> float:
        """The learning rate of the bucket's parameter group at this step."""
        lr = self.entries[bucket.slots[0].index].group.get("lr")
        if lr is None:
            raise ValueError(
                "DelayCompensated needs the learning rate of every parameter group, and "
                f"group {bucket.kind.group} has no 'lr'; wrap an optimizer that has one"
            )
        return float(lr)

    def _recursion(self, bucket: Bucket) -> Recursion:
        settings = self.settings
        # Horovod averages over ranks and sums over backward passes; losses are divided by the
        # passes and multiplied by the loss scale. The workers' own gradients are without both.
        return Recursion(step=self._lr(bucket) / (self._mean_of * self.parts),
                         lam=settings.lam, adaptive=settings.keeps_mean_square,
                         decay=settings.decay, eps=settings.eps,
                         cumulative=settings.displacement == "cumulative",
                         scale=self.parts / self.options.loss_scale(),
                         divisor=self._mean_of)

    # State

    def _mean_square(self, bucket: Bucket, like: torch.Tensor) -> torch.Tensor | None:
        if not self.settings.keeps_mean_square:
            return None
        if bucket.index not in self.mean_square:
            self.mean_square[bucket.index] = torch.zeros(
                like.shape, dtype=accumulation_dtype(like.dtype), device=like.device
            )
        return self.mean_square[bucket.index]

    def _check_ranks(self) -> None:
        """After an elastic change of the number of ranks slices have moved: start MeanSquare anew."""
        if self._ranks != self.collectives.size:
            if self.mean_square:
                warnings.warn(
                    f"the number of ranks changed from {self._ranks} to {self.collectives.size}: "
                    "DelayCompensated starts MeanSquare anew", stacklevel=4,
                )
            self.reset_per_rank_state()
            self._ranks = self.collectives.size

    def forget(self) -> None:
        if self._started:
            self._receive = {}
        super().forget()
        self._present.clear()
        self._spare.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "unusable_steps": self.unusable_steps,
            "mean_square": {index: ms.clone() for index, ms in self.mean_square.items()},
        }

    def shared_state(self) -> dict[str, Any]:
        return {"steps": self.steps, "unusable_steps": self.unusable_steps}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        self.steps, self.unusable_steps = state["steps"], state["unusable_steps"]

    def committed(self) -> dict[str, Any]:
        """Also MeanSquare of whole buckets: it is the same quantity whoever owns the slice."""
        state = self.state_dict()
        if self.collectives.size > 1:
            collectives = Collectives(self.collectives.process_set)  # no part of a step's bytes
            gathering = {index: collectives.allgather_async(own, f"{self.prefix}/mean_square{index}",
                                                            kind="mean squares")
                         for index, own in sorted(state["mean_square"].items())}
            state["mean_square"] = {index: one.wait() for index, one in gathering.items()}
        return state

    def take_back(self, committed: dict[str, Any], own: dict[str, Any] | None) -> None:
        ranks = self._ranks = max(1, self.collectives.size)
        slices = {index: ms.split(slice_sizes(ms.numel(), ranks))[self.collectives.rank]
                  for index, ms in committed["mean_square"].items()}
        self.load_state_dict({**committed, "mean_square": slices})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        ranks = max(1, self.collectives.size)
        loaded = {}
        for index, ms in state["mean_square"].items():
            bucket = self.buckets[index] if index < len(self.buckets) else None
            own = slice_sizes(bucket.numel, ranks)[self.collectives.rank] if bucket else None
            if bucket is None or ms.numel() != own:
                raise ValueError(
                    f"MeanSquare of bucket {index} has {ms.numel()} elements in the checkpoint and "
                    f"{own} here: the model, bucket_bytes or groups differ; build the optimizer as "
                    "it was saved, or pass reset_per_rank_state=True"
                )
            loaded[index] = ms.to(self.parameter(bucket).device, copy=True)
        self.mean_square = loaded
        self.steps = state["steps"]
        self.unusable_steps = state["unusable_steps"]

    def reset_per_rank_state(self) -> None:
        self.mean_square = {}
        self.steps = self.unusable_steps = 0

    def bytes_held(self) -> int:
        held = [*self._receive.values(), *self.mean_square.values()]
        return super().bytes_held() + sum(t.numel() * t.element_size() for t in held)

    def report(self) -> dict[str, Any]:
        return {**super().report(), "workers": self.collectives.size * self.parts,
                "unusable_steps": self.unusable_steps}

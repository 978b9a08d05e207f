"""Delay-compensated reduction at the price of an allreduce: slices out, recursion, slices back.

Of every bucket rank s receives slice s of every rank's gradient (alltoall, during the backward
pass); the ranks exchange the lengths of their steps, from which all derive the same order; each
runs the recursion on its slice, and the reduced slices are gathered. Out and back together move
``2 (M-1)/M`` of the bucket's bytes, what a ring allreduce moves. Where the order is known before
the backward pass ends, a bucket that has arrived goes back at once.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_ext.reducers.buckets import Bucket, BucketKey, TensorSlice, check_message, slice_sizes
from hvd_ext.reducers.delay_compensation import STATE, DelayCompensated
from hvd_ext.reducers.delay_compensation.slices import VirtualWorker, all_usable, application_order
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.reducers.skipped_step import SkippedStep
from hvd_ext.state import Part
from hvd_ext.torch.async_d2h import AsyncHostCopy
from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.reducers.base import NamedParameter
from hvd_ext.torch.reducers.buckets import BucketReducer, PendingAgreement, Started
from hvd_ext.torch.reducers.declared_state import load_state
from hvd_ext.torch.reducers.delay_compensation_step import ABSENT, InFlightBucket, StepState
from hvd_ext.torch.reducers.kernels import delay_compensation as kernels


class DelayReducer(BucketReducer):
    """The reducer of ``op=hvd.DelayCompensated(...)``.

    With ``options.half`` float16 travels; the recursion runs in float32 (float64 for float64
    gradients) whatever travels.
    """

    settings: DelayCompensated

    def __init__(self, collectives: Collectives, settings: DelayCompensated,
                 options: ReductionOptions) -> None:
        super().__init__(collectives, settings, options)
        self.unusable_steps = 0
        self._skipped = SkippedStep()
        self.mean_square: dict[int, torch.Tensor] = {}
        self._ranks = collectives.size if collectives.is_member else 1
        self._receive: dict[tuple[int, int], torch.Tensor] = {}
        self._spare: dict[NamedParameter, torch.Tensor] = {}
        self._present: set[int] = set()
        self._good = True
        self._step = StepState()
        self._advancing = threading.Lock()  # autograd has a thread for each device

    # Planning and filling

    def register_parameters(self, entries: Sequence[NamedParameter]) -> None:
        super().register_parameters(entries)
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
    def _is_alone(self) -> bool:
        """One worker only: its gradient is the result."""
        return self.collectives.size * self.parts == 1

    @property
    def _order_is_fixed(self) -> bool:
        """Whether the order is that of the ranks, whatever their gradients are."""
        return self.settings.order == "rank" and self.parts == 1

    @property
    def _order_known_early(self) -> bool:
        """Whether the order is known before the gradients are, of ranks that agree on the rest."""
        from hvd_ext.torch.uneven_data import is_active  # which imports the wrapper, and that this

        return (self._order_is_fixed and self.met == self.plan
                and self._ranks == self.collectives.size and not is_active())

    @property
    def _skips_own_slice(self) -> bool:
        """Whether this rank's own slice does not pass through the alltoall.

        What is sent must lie in one piece, which it does without the first slice or the last.
        """
        return self.collectives.rank in (0, self.collectives.size - 1)

    def bucket_key(self, entry: NamedParameter) -> BucketKey:
        return replace(super().bucket_key(entry), group=entry.group_index)  # the groups' rates may differ

    def buffer_dtype(self, bucket: Bucket) -> torch.dtype:
        return torch.float16 if self.options.half else super().buffer_dtype(bucket)

    def gradient_ready(self, entry: NamedParameter, passes_done: int, pass_number: int) -> None:
        self._present.add(pass_number - 1 if self.parts > 1 else 0)
        if not self._is_alone:
            super().gradient_ready(entry, passes_done, pass_number)
            self.poll()

    def write_to_bucket(self, entry: NamedParameter, bucket: Bucket, slot: TensorSlice, part: int) -> None:
        super().write_to_bucket(entry, bucket, slot, part)
        if entry.parameter.grad is not None:
            self._present.add(part)
            if self.parts > 1:
                # The next micro-batch is a worker of its own; its memory is kept for the result.
                self._spare.setdefault(entry, entry.parameter.grad)
                entry.parameter.grad = None

    def start_exchange(self, bucket: Bucket, part: int, flat: torch.Tensor) -> InFlightBucket:
        if not self._started and self._order_known_early:
            self._step.order = [VirtualWorker(rank, 0, 0.0) for rank in range(self.collectives.size)]
            for one in self.buckets:
                self._learning_rate(one)
        return InFlightBucket(handle=self._send_slices(bucket, part, flat),
                              square=AsyncHostCopy(kernels.square_norm(flat)))

    def _send_slices(self, bucket: Bucket, part: int, flat: torch.Tensor) -> Handle | None:
        if self.collectives.size == 1:
            return None
        name = f"{self.prefix}/bucket{bucket.index}" + (f"/part{part}" if part else "")
        memory = self._receive.setdefault((bucket.index, part), flat.new_empty(0))
        splits = slice_sizes(bucket.numel, self.collectives.size)
        if self._skips_own_slice:
            own, splits[self.collectives.rank] = splits[self.collectives.rank], 0
            flat = flat[own:] if self.collectives.rank == 0 else flat[:bucket.numel - own]
        return self.collectives.alltoall_async(flat, splits, name, out=memory)

    def poll(self) -> None:
        """Start the second half of buckets that have arrived, where the order is known. Never waits.

        Ranks may start others here, or none, and the rest in ``finish()``: the result is the same.
        """
        if not self._advancing.acquire(blocking=False):
            return
        try:
            if self._step.order is None and self._asked is not None and self._asked.done():
                self._settle_if_agreed(self._asked)
            self._start_return(wait=False)
        finally:
            self._advancing.release()

    # At the end of the step

    def start_remaining(self) -> None:
        if not self._is_alone:
            super().start_remaining()
            if self._asked is None:
                self.start_agreement([*(self._learning_rate(bucket) for bucket in self.buckets),
                                      *self._squared_step_lengths()])

    def finish(self) -> bool:
        self._check_ranks()
        if self._is_alone:
            self.abort_step()
            self._usable = True
            return True
        done = super().finish()
        self._usable = self._good
        return done

    def finish_exchange(self, started: Started) -> tuple[list[torch.Tensor], bool]:
        self._start_return(wait=False)
        rows = self.finish_agreement()
        if not self._fix_order(rows):
            self._start_return(wait=True)  # others may have begun to: no rank is left waiting
            by_rank = [tuple(dict.fromkeys(row[:-self.parts])) for row in rows]
            raise self.collective_error(
                "the ranks' learning rates differ at this step, which DelayCompensated needs to be the "
                f"same: {by_rank} by rank. Give every rank the same schedule, and load the same checkpoint")
        good = bool(self._step.good)
        self._start_return(wait=True)
        gathering = [self._back[bucket.index] for bucket in self.buckets]
        reduced = [one.wait() if isinstance(one, Handle) else one for one in gathering]
        if not good:
            self.abandon()
        self._skipped.begin_step(good, self.loss_scale())
        self._good = good
        for entry, gradient in self._spare.items():
            if entry.parameter.grad is None:
                entry.parameter.grad = gradient
        return reduced, True  # gradients that are not finite reach every rank in their entries

    def _squared_step_lengths(self) -> list[float]:
        """The squared lengths of the steps of this rank's workers."""
        squares = [0.0] * self.parts
        for (index, part), sent in sorted(self._started.items()):
            squares[part] += self._step.rates[index] ** 2 * float(sent.square.read())
        if self.parts > 1 or self.absent:
            squares = [s if part in self._present else ABSENT for part, s in enumerate(squares)]
        return squares

    def _settle_if_agreed(self, asked: PendingAgreement) -> None:
        numbers, rows = asked.read()
        if len(set(numbers)) == 1:  # else finish() raises
            self._fix_order(rows)

    def _fix_order(self, rows: Sequence[Sequence[float]]) -> bool:
        """Take the order from what the ranks have told, if they have the same learning rates."""
        if any(row[:-self.parts] != rows[0][:-self.parts] for row in rows):
            return False
        workers = [VirtualWorker(rank, part, square) for rank, row in enumerate(rows)
                   for part, square in enumerate(row[-self.parts:]) if square != ABSENT]
        good = self._step.good = all_usable(workers)
        self._step.order = application_order(workers, self.settings.order if good else "rank")
        return True

    def _start_return(self, *, wait: bool) -> None:
        """Reduce and gather buckets that have arrived, or all that are started, if the order is known."""
        if (order := self._step.order) is None:
            return
        try:
            for bucket in self.buckets:
                sent = [self._started.get((bucket.index, part)) for part in range(self.parts)]
                if bucket.index in self._back or None in sent:
                    continue
                if wait or all(one.handle is None or one.handle.is_done() for one in sent):
                    self._back[bucket.index] = self._reduce_slice(bucket, sent, order)
        except BaseException:
            self._step.order = None  # nothing goes on after it
            raise

    def _reduce_slice(self, bucket: Bucket, sent: Sequence[Any],
                      order: Sequence[VirtualWorker]) -> Handle | torch.Tensor:
        """Reduce this rank's slice of a bucket and start gathering it."""
        ranks = self.collectives.size
        if ranks > 1:
            rank, sizes = self.collectives.rank, slice_sizes(bucket.numel, ranks)
            slices = []  # by part and rank
            for part, one in enumerate(sent):
                rows = list(one.handle.wait().view(ranks - self._skips_own_slice, sizes[rank]).unbind())
                if self._skips_own_slice:
                    rows.insert(rank, self.flat_buffer(bucket, part).split(sizes)[rank])
                slices.append(rows)
            out = self.flat_buffer(bucket).split(sizes)[rank]  # what was sent has arrived: its memory is free
        else:
            slices = [[self.flat_buffer(bucket, part)] for part in range(self.parts)]
            out = self._receive.setdefault((bucket.index, 0), torch.empty_like(slices[0][0]))
        rows = [slices[w.part][w.rank] for w in order]
        if not rows:
            out.zero_()
        elif self._order_is_fixed or self._step.good:  # a fixed order does not wait for that
            kernels.compensated_sum(rows, self._build_recursion(bucket), self._mean_square(bucket, out), out)
        else:
            kernels.plain_sum(rows, out, self._mean_of)
        return out if ranks == 1 else self.collectives.allgather_async(
            out, f"{self.prefix}/bucket{bucket.index}/reduced", out=self._receive[bucket.index, 0])

    def _learning_rate(self, bucket: Bucket) -> float:
        """The learning rate of the bucket's parameter group, of when this step first asked for it."""
        rates = self._step.rates
        if bucket.index not in rates:
            lr = self.entries[bucket.slots[0].index].group.get("lr")
            if lr is None:
                raise ValueError(
                    "DelayCompensated needs the learning rate of every parameter group, and group "
                    f"{bucket.kind.group} has no 'lr'; wrap an optimizer that has one")
            rates[bucket.index] = float(lr)
        return rates[bucket.index]

    def _build_recursion(self, bucket: Bucket) -> kernels.Recursion:
        step = self._step
        if step.loss_scale is None:
            step.loss_scale = float(self.options.loss_scale())
        # Horovod averages over ranks and sums over backward passes; losses are divided by the
        # passes and multiplied by the loss scale. The workers' own gradients are without both.
        return kernels.Recursion.from_settings(self.settings,
                                       self._learning_rate(bucket) / (self._mean_of * self.parts),
                                       scale=self.parts / step.loss_scale, divisor=self._mean_of)

    # State

    def _mean_square(self, bucket: Bucket, like: torch.Tensor) -> torch.Tensor | None:
        """What the recursion turns into MeanSquare as it is once the step is taken: a copy of it."""
        if not self.settings.keeps_mean_square:
            return None
        kept = self.mean_square.get(bucket.index)
        if kept is None:
            kept = torch.zeros(like.shape, dtype=kernels.accumulation_dtype(like.dtype), device=like.device)
        draft = self.spare_memory("mean_square", bucket)
        draft = torch.empty_like(kept) if draft is None or draft.shape != kept.shape else draft
        return self.stage("mean_square", bucket, draft.copy_(kept))

    def _check_ranks(self) -> None:
        """After an elastic change of the number of ranks slices have moved: start MeanSquare anew."""
        if self._ranks != self.collectives.size:
            if self.mean_square:
                warnings.warn(f"the number of ranks changed from {self._ranks} to {self.collectives.size}: "
                              "DelayCompensated starts MeanSquare anew", stacklevel=4)
            self.abandon()  # the step under way has begun: it goes on
            load_state(self, {})
            self._ranks = self.collectives.size

    def commit(self) -> None:
        self.unusable_steps += self._skipped.count_committed()
        super().commit()

    def abandon(self) -> None:
        self.unusable_steps += self._skipped.count_abandoned(float(self.options.loss_scale()))
        super().abandon()

    def drain(self) -> None:
        with contextlib.suppress(HorovodInternalError, ValueError):  # as in what this overrides
            if self._asked is not None:
                self._settle_if_agreed(self._asked)
            self._start_return(wait=True)  # others may have begun to, and wait for this rank
        super().drain()

    def abort_step(self) -> None:
        if self._started:
            self._receive = {}
        super().abort_step()
        self._present.clear()
        self._spare.clear()
        self._step = StepState()

    STATE = STATE

    def keeps_part(self, part: Part, bucket: Bucket) -> bool:
        return self.settings.keeps_mean_square

    def on_state_taken(self) -> None:
        self._ranks = max(1, self.collectives.size)

    def held_tensors(self) -> list[torch.Tensor]:
        return [*super().held_tensors(), *self._receive.values()]

    def report(self) -> dict[str, Any]:
        return {**super().report(), "workers": self.collectives.size * self.parts,
                "unusable_steps": self.unusable_steps}

"""Sparse allreduce of chosen entries: what a rank sends is O(k), however many ranks there are.

entries to the owners of their places (alltoall) -> their mean + what the owner kept -> a threshold for
about k entries in all (allgather of a few numbers) -> the entries above it to all ranks (allgather); the
owner keeps the rest

The class of exchanges of Ok-Topk (Li and Hoefler, PPoPP 2022), with a residual at the owner, so that
nothing is lost: the sum over ranks of e, M times all owners' residuals and M times all that was applied
add up to all gradients so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hvd_ext.reducers.buckets import Bucket, TensorSlice
from hvd_ext.reducers.topk import TopK, allreduce
from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.reducers.frozen import cut_slots
from hvd_ext.torch.reducers.kernels import topk_allreduce as kernels

Swap = Callable[[Bucket], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class OwnerState:
    """What this rank keeps of a bucket: who owns what, and the residual (length of its range,).

    ``rank`` is the number under which it owns its range. ``residual`` is None before the first step,
    and without error feedback.
    """

    ranges: allreduce.OwnerRanges
    rank: int
    residual: torch.Tensor | None = None


@dataclass
class OwnerSum:
    """A bucket in the middle of its exchange.

    Attributes:
        k_out: entries that all owners together are to send back.
        low: the first place of this rank's range.
        mean: what this rank owns of the mean over the ranks, with its residual (length of the range,).
        places: the candidates in it.
        left: the bucket's new residual e (numel,).
        out: memory for the reduced gradient (numel,).
        waiting: this rank's residual where parameters are frozen, zeros elsewhere; None for none.
    """

    bucket: Bucket
    k_out: int
    low: int
    mean: torch.Tensor
    places: torch.Tensor
    left: torch.Tensor
    out: torch.Tensor
    waiting: torch.Tensor | None = None


class SparseAllreduce:
    """The exchange of ``Compression.topk(exchange="sparse_allreduce")``, for one reducer.

    Attributes:
        owned: what this rank keeps, by number of the bucket.
        imbalance: entries that the fullest owner of any bucket received at the last step, relative to
            the mean of all owners.
        applied: entries that all ranks applied at the last step.
    """

    def __init__(self, collectives: Collectives, settings: TopK, buckets: Sequence[Bucket] = (),
                 options: Callable[[Bucket], dict[str, Any]] = lambda bucket: {}) -> None:
        self.collectives = collectives
        self.settings = settings
        self._buckets = buckets
        self._options = options  # dtype and device of a bucket's residual
        self.owned: dict[int, OwnerState] = {}
        self._began: dict[int, OwnerState] = {}  # what a step begins with where nothing usable is kept
        self._pending: dict[int, OwnerState] = {}  # of a step that is reduced and not taken
        self.imbalance = 1.0
        self.applied = 0

    def is_stale(self, bucket: Bucket) -> bool:
        """Whether what this rank keeps belongs to another number of ranks."""
        owned = self.owned.get(bucket.index)
        return owned is not None and owned.ranges.ranks != self.collectives.size

    def send_to_owners(self, bucket: Bucket, positions: torch.Tensor, values: torch.Tensor,
                       prefix: str) -> Handle:
        """Send each entry to the owner of its place.

        Args:
            positions: (k,) int64, rising.
            values: (k,) of the wire's dtype.
        """
        self._began.pop(bucket.index, None)
        if bucket.index not in self.owned or self.is_stale(bucket):
            bounds = allreduce.even_bounds(bucket.numel, self.collectives.size)
            self._began[bucket.index] = OwnerState(allreduce.OwnerRanges(bounds), self.collectives.rank)
        owned = self._owned_now(bucket)
        message, layouts = kernels.for_owners(owned.ranges.bounds, positions, values, self.settings.values)
        parts = [layout.bytes_by_kind() for layout in layouts]
        return self.collectives.alltoall_async(
            message, [layout.words for layout in layouts], f"{prefix}/bucket{bucket.index}",
            kind={kind: sum(part[kind] for part in parts) for kind in parts[0]})

    def finish_exchange(self, received: Sequence[tuple[Bucket, torch.Tensor, int]], prefix: str, swap: Swap,
                        rescale: float, frozen: Callable[[Bucket], list[TensorSlice]]) -> list[torch.Tensor]:
        """What becomes of all buckets' messages: the reduced gradients, (numel,) each.

        Args:
            received: bucket, the messages that came for this rank, and the entries to be sent back by
                all owners together.
            swap: gives the residual e of a bucket, and memory for the mean.
            rescale: what brings this rank's residuals to this step's loss scale.
            frozen: gives the places of a bucket's frozen parameters, whose residual waits.
        """
        if not received:
            return []
        summed, rows = [], []
        for bucket, messages, k_out in received:
            one, row = self._sum_messages(bucket, messages, k_out, rescale, prefix, frozen(bucket),
                                          *swap(bucket))
            summed.append(one)
            rows.append(row)
        told = self.collectives.allgather_async(
            torch.from_numpy(np.stack(rows)), f"{prefix}/thresholds", kind="thresholds")
        by_bucket = told.wait().numpy().reshape(self.collectives.size, len(rows), -1).swapaxes(0, 1)
        handles = [self._send_reply(one, table, prefix)
                   for one, table in zip(summed, by_bucket, strict=True)]
        self.imbalance = max(allreduce.measure_imbalance(table) for table in by_bucket)
        self.applied = 0
        for one, table, handle in zip(summed, by_bucket, handles, strict=True):
            self.applied += kernels.scatter_entries(handle.wait(), self.settings, self.collectives.size,
                                                    one.out,
                                                    f"{prefix}/bucket{one.bucket.index}/means")
            self._move_on(one, table)
        return [one.out for one in summed]

    def _sum_messages(self, bucket: Bucket, messages: torch.Tensor, k_out: int, rescale: float, prefix: str,
                      frozen: list[TensorSlice], left: torch.Tensor,
                      out: torch.Tensor) -> tuple[OwnerSum, allreduce.Numbers]:
        """The means in this rank's range, in the order of the ranks, and what it tells of them."""
        owned, ranks = self._owned_now(bucket), self.collectives.size
        low, high = owned.ranges.bounds_of(owned.rank)
        mean = left.new_zeros(high - low)
        residual, waiting = owned.residual, None
        held = [] if residual is None else cut_slots(frozen, low, high)
        if residual is not None and held:
            waiting = torch.zeros_like(residual)
            for place in held:
                waiting[place] = residual[place]
            residual = residual - waiting
            waiting.mul_(rescale)
        places, row = kernels.sum_up(
            messages, residual, rescale, low, mean, allreduce.count_bins(owned.ranges.bounds)[owned.rank],
            ranks, k_out, self.settings, f"{prefix}/bucket{bucket.index}")
        return OwnerSum(bucket, k_out, low, mean, places, left, out, waiting), row

    def _send_reply(self, one: OwnerSum, table: allreduce.Numbers, prefix: str) -> Handle:
        """Send the entries above the threshold to all ranks; what is left in ``one.mean`` is kept."""
        message, layout = kernels.build_reply(one.mean, one.places, one.low, table, one.k_out, self.settings)
        return self.collectives.allgather_async(
            message, f"{prefix}/bucket{one.bucket.index}/means", kind=layout.bytes_by_kind())

    def _move_on(self, one: OwnerSum, table: allreduce.Numbers) -> None:
        """Keep the rest, pending; where ranges change it becomes part of this rank's e, times M."""
        owned = self._owned_now(one.bucket)
        rest = one.mean if self.settings.error_feedback else None
        if rest is not None and one.waiting is not None:
            rest.add_(one.waiting)
        following = owned.ranges.next_ranges(table)
        if following.age == 0 and rest is not None:
            _add_to_residual(OwnerState(owned.ranges, owned.rank, rest), one.left)
            rest = None
        self._pending[one.bucket.index] = OwnerState(following, owned.rank, rest)

    def commit(self) -> None:
        """The step is taken: what it left pending holds."""
        self.owned.update(self._pending)
        self.abandon()

    def abandon(self) -> None:
        """The step is not taken: drop what it left pending."""
        self._pending, self._began = {}, {}

    def _owned_now(self, bucket: Bucket) -> OwnerState:
        """What the step under way begins with."""
        return self._began.get(bucket.index) or self.owned[bucket.index]

    @property
    def is_used(self) -> bool:
        """Whether buckets travel this way."""
        return bool(self.owned or self._pending)

    def has_residual(self, bucket: Bucket) -> bool:
        """Whether this rank keeps anything of the bucket as an owner."""
        owned = self.owned.get(bucket.index)
        return owned is not None and owned.residual is not None

    def fold_residual(self, number: int, residual: torch.Tensor, scale: float = 1.0, *,
                      keep: bool = False) -> None:
        """Add what this rank keeps as the owner of a range to its e, (numel,), and keep no more of it.

        e counts 1/M in the mean, an owner's residual whole.
        """
        owned = self.owned.get(number)
        if owned is None or owned.residual is None:
            return
        _add_to_residual(owned, residual, scale)
        owned.residual = owned.residual if keep else None

    # State and figures

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """By bucket: its ranges, and this rank's residual as the owner of one."""
        return {number: {"rank": owned.rank, "bounds": owned.ranges.bounds.tolist(), "age": owned.ranges.age,
                         "wait": owned.ranges.wait,
                         "residual": None if owned.residual is None else owned.residual.clone()}
                for number, owned in self.owned.items()}

    def check_state_dict(self, state: dict[int, dict[str, Any]]) -> None:
        """Refuse ranges of other buckets.

        Raises:
            ValueError: a bucket has another size here.
        """
        for number, one in state.items():
            if number >= len(self._buckets) or one["bounds"][-1] != self._buckets[number].numel:
                raise ValueError(
                    f"the checkpoint's residual of bucket {number} does not fit this model; use the "
                    "model, bucket_bytes= and groups= that it was saved with, or pass "
                    "reset_per_rank_state=True to start without residuals")

    def load_state_dict(self, state: dict[int, dict[str, Any]] | None) -> None:
        """Take back what :meth:`state_dict` gave, on the buckets' devices; None: begin new."""
        self.owned = {}
        for number, one in (state or {}).items():
            kept = one["residual"]
            ranges = allreduce.OwnerRanges(np.array(one["bounds"], np.int64), one["age"], one["wait"])
            self.owned[number] = OwnerState(ranges, one["rank"], None if kept is None else kept.to(
                **self._options(self._buckets[number]), copy=True))

    def common_state(self, state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """What of another rank's state holds here: who owns which range, on which the ranks must agree."""
        return {number: {**one, "rank": self.collectives.rank, "residual": None}
                for number, one in state.items()}

    def state_tensors(self) -> list[torch.Tensor]:
        """This rank's residuals, as an owner."""
        return [owned.residual for owned in self.owned.values() if owned.residual is not None]


def _add_to_residual(owned: OwnerState, residual: torch.Tensor, scale: float = 1.0) -> None:
    """Add an owner's residual, which counts whole in the mean, to its e (numel,), which counts 1/M."""
    assert owned.residual is not None
    low, high = owned.ranges.bounds_of(owned.rank)
    residual[low:high].add_(owned.residual, alpha=owned.ranges.ranks * scale)

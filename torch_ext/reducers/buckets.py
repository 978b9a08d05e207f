"""Reducers whose gradients travel in flat buckets, each started as soon as its gradients are there."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch

from hvd_ext.agreement import digest, disagreement
from hvd_ext.buckets import (
    DEFAULT_BUCKET_BYTES,
    Bucket,
    Kind,
    Slot,
    TensorSpec,
    plan_buckets,
    split_groups,
)
from hvd_ext.header import pack_row, unpack_rows
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.reducers.base import Entry, Reducer


class BucketReducer(Reducer):
    """Plans buckets, sees when one is complete, and makes the ranks agree before any result is used.

    Subclasses pack gradients (``_take``), start a bucket's exchange (``_start``) and finish it.
    Once a parameter is in the plan it stays there; without a gradient it takes part with zeros.
    Parameters that come later (``add_param_group``, unfreezing) get buckets of their own, so that
    state kept for earlier buckets stays valid.
    """

    def __init__(self, collectives: Collectives, passes: int, *, label: str,
                 settings: Any = None, bucket_bytes: int = DEFAULT_BUCKET_BYTES,
                 groups: Any = None, sparse_as_dense: bool = False) -> None:
        super().__init__(collectives, passes)
        self.label = label
        self.settings = settings
        self.bucket_bytes = bucket_bytes
        self.groups = groups
        self.sparse_as_dense = sparse_as_dense
        self.buckets: list[Bucket] = []
        self.specs: list[TensorSpec] = []
        self._place: dict[Entry, tuple[Bucket, Slot]] = {}
        self._taken: dict[tuple[int, int], set[Entry]] = {}
        self._begun: set[tuple[int, int]] = set()
        self._sparse: set[Entry] = set()

    # Planning

    def set_entries(self, entries: Sequence[Entry]) -> None:
        known = set(self.entries)
        added = [entry for entry in entries if entry not in known]
        if not added:
            return
        base = len(self.entries)
        specs = [self._spec(entry) for entry in added]
        groups = self._groups_of(added)
        for bucket in plan_buckets(specs, bucket_bytes=self.bucket_bytes, groups=groups):
            slots = tuple(Slot(s.index + base, s.offset, s.numel) for s in bucket.slots)
            placed = Bucket(len(self.buckets), slots, bucket.kind)
            self.buckets.append(placed)
            for slot in slots:
                self._place[added[slot.index - base]] = (placed, slot)
        self.entries = [*self.entries, *added]
        self.specs += specs
        self._plan_changed()

    def _spec(self, entry: Entry) -> TensorSpec:
        parameter = entry.parameter
        kind = Kind(str(parameter.dtype), parameter.device.type, entry.group_index)
        return TensorSpec(entry.name, tuple(parameter.shape), parameter.element_size(), kind)

    def _groups_of(self, entries: Sequence[Entry]) -> list[list[int]] | None:
        return split_groups(self.groups, [entry.parameter for entry in entries])

    def _plan_changed(self) -> None:
        """The plan has grown: make buffers for new buckets."""

    def digest(self) -> int:
        """A number that is alike on ranks that plan the same exchange."""
        return digest(self.label, self.settings, self.passes, self.bucket_bytes, self.specs)

    # Filling buckets during the backward pass

    def gradient_ready(self, entry: Entry, passes_done: int) -> None:
        part = self._part(passes_done)
        if part is None or entry not in self._place:
            return
        bucket, slot = self._place[entry]
        key = (bucket.index, part)
        self._take(entry, bucket, slot, part)
        taken = self._taken.setdefault(key, set())
        taken.add(entry)
        if len(taken) == len(bucket.slots):
            self._begin(bucket, part)

    def _part(self, passes_done: int) -> int | None:
        """Which part of the step a backward pass is; None when its gradient is to wait."""
        return 0 if passes_done == self.passes else None

    def parts_of_step(self) -> int:
        """How many parts, each an exchange of its own, a bucket has in a step."""
        return 1

    def begin_rest(self) -> None:
        """Start what the hooks did not: buckets with gradients missing, which count as zeros."""
        for bucket in self.buckets:
            for part in range(self.parts_of_step()):
                key = (bucket.index, part)
                if key in self._begun:
                    continue
                for slot in bucket.slots:
                    entry = self.entries[slot.index]
                    if entry not in self._taken.get(key, ()):
                        self._take(entry, bucket, slot, part, late=True)
                self._begin(bucket, part)

    def _begin(self, bucket: Bucket, part: int) -> None:
        self._begun.add((bucket.index, part))
        self._start(bucket, part)

    def dense(self, entry: Entry) -> torch.Tensor | None:
        """The entry's gradient as a dense tensor; None when there is none.

        Raises:
            ValueError: it is sparse and ``sparse_as_dense`` is not set.
        """
        gradient = entry.parameter.grad
        if gradient is None or not gradient.is_sparse:
            return gradient
        if not self.sparse_as_dense:
            raise ValueError(
                f"{entry.name} has a sparse gradient, which {self.label} cannot take; pass "
                "sparse_as_dense=True to DistributedOptimizer, or make the layer's gradient dense"
            )
        self._sparse.add(entry)
        return gradient.to_dense()

    def give_back(self, entry: Entry, reduced: torch.Tensor) -> None:
        """Copy ``reduced``, of the parameter's shape, into the entry's gradient."""
        parameter = entry.parameter
        if entry in self._sparse:
            parameter.grad = reduced.to(parameter.dtype).to_sparse()
        elif parameter.grad is None:
            parameter.grad = torch.empty_like(parameter).copy_(reduced)
        else:
            parameter.grad.copy_(reduced)

    # Agreement of the ranks

    def agree(self, values: Sequence[float]) -> list[list[float]]:
        """Exchange a few numbers a rank; every rank's, by rank.

        Raises:
            ValueError: on every rank alike, when their parameters or settings differ.
        """
        row = torch.from_numpy(pack_row(self.digest(), values))
        name = f"{self.label}/agree"
        gathered = self.collectives.allgather_async(row, name, kind="agreement").wait()
        digests, rows = unpack_rows(gathered.numpy())
        if any(other != digests[0] for other in digests):
            mine = [f"settings {self.settings!r} with {self.passes} backward passes per step"]
            mine += [str(spec) for spec in self.specs]
            everyone = self.collectives.allgather_object(mine, f"{self.label}/disagreement")
            raise ValueError(disagreement(
                "the ranks do not train the same parameters in the same way", everyone,
                "Build the same model and optimizer on every rank"))
        return rows

    def forget(self) -> None:
        self._taken.clear()
        self._begun.clear()

    @abc.abstractmethod
    def _take(self, entry: Entry, bucket: Bucket, slot: Slot, part: int, *,
              late: bool = False) -> None:
        """Take the entry's gradient into the bucket; ``late`` outside the backward pass, perhaps None."""

    @abc.abstractmethod
    def _start(self, bucket: Bucket, part: int) -> None:
        """Start the exchange of a complete bucket."""

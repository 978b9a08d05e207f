"""Delay-compensated reduction at the price of an allreduce: slices out, recursion, slices back.

Of every bucket rank s receives slice s of every rank's gradient (alltoall, during the backward
pass); the ranks exchange the lengths of their steps, from which all derive the same order; each
runs the recursion on its slice, and the reduced slices are gathered. Out and back together move
``2 (M-1)/M`` of the bucket's bytes, what a ring allreduce moves.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from hvd_ext.buckets import DEFAULT_BUCKET_BYTES, Bucket, Slot, slice_sizes
from hvd_ext.delay.config import DelayCompensated
from hvd_ext.delay.slices import VirtualWorker, application_order, usable
from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.reducers.base import Entry
from hvd_ext.torch.reducers.buckets import BucketReducer
from hvd_ext.torch.reducers.delay_kernels import (
    Recursion,
    accumulation_dtype,
    compensated_sum,
    plain_sum,
    square_norm,
)

ABSENT = -1.0  # in place of a squared norm: this rank had no such micro-batch


class DelayReducer(BucketReducer):
    """The reducer of ``op=hvd.DelayCompensated(...)``.

    Args:
        collectives: the ranks to reduce over.
        passes: backward passes per step.
        config: the method's settings.
        wire_dtype: dtype of gradients on the wire; None for the parameter's own. The recursion
            runs in float32 (float64 for float64 gradients) whatever travels.
        scaler: a ``torch.amp.GradScaler`` whose scale the gradients carry, or None.
    """

    def __init__(self, collectives: Collectives, passes: int, config: DelayCompensated, *,
                 label: str = "delay", wire_dtype: torch.dtype | None = None, scaler: Any = None,
                 bucket_bytes: int = DEFAULT_BUCKET_BYTES, groups: Any = None,
                 sparse_as_dense: bool = False) -> None:
        super().__init__(collectives, passes, label=label, settings=(config, str(wire_dtype)),
                         bucket_bytes=bucket_bytes, groups=groups, sparse_as_dense=sparse_as_dense)
        self.config = config
        self.wire_dtype = wire_dtype
        self.scaler = scaler
        self.steps = 0
        self.unusable_steps = 0
        self.mean_square: dict[int, torch.Tensor] = {}
        self._ranks = collectives.size if collectives.included else 1
        self._send: dict[tuple[int, int], torch.Tensor] = {}
        self._receive: dict[tuple[int, int], torch.Tensor] = {}
        self._spare: dict[Entry, torch.Tensor] = {}
        self._norms: dict[tuple[int, int], torch.Tensor] = {}
        self._handles: dict[tuple[int, int], Handle] = {}
        self._present: set[int] = set()

    # During the backward pass

    @property
    def _by_microbatch(self) -> bool:
        return self.config.virtual_workers == "microbatch"

    def parts_of_step(self) -> int:
        return self.passes if self._by_microbatch else 1

    def _part(self, passes_done: int) -> int | None:
        return passes_done - 1 if self._by_microbatch else super()._part(passes_done)

    @property
    def _alone(self) -> bool:
        """One worker only: its gradient is the result."""
        return self.collectives.size * self.parts_of_step() == 1

    def gradient_ready(self, entry: Entry, passes_done: int) -> None:
        if not self._alone:
            super().gradient_ready(entry, passes_done)

    def _take(self, entry: Entry, bucket: Bucket, slot: Slot, part: int, *,
              late: bool = False) -> None:
        flat = self._buffer(bucket, part)
        target = flat[slot.offset : slot.offset + slot.numel]
        gradient = self.dense(entry)
        if gradient is None:
            target.zero_()
        else:
            target.view(gradient.shape).copy_(gradient)
            self._present.add(part)
            if self._by_microbatch:
                # The next micro-batch is a worker of its own; its memory is kept for the result.
                self._spare.setdefault(entry, gradient)
                entry.parameter.grad = None
        if not late:
            self._present.add(part)

    def _buffer(self, bucket: Bucket, part: int) -> torch.Tensor:
        key = (bucket.index, part)
        if key not in self._send:
            parameter = self.entries[bucket.slots[0].index].parameter
            self._send[key] = torch.empty(
                bucket.numel, dtype=self._wire(parameter), device=parameter.device
            )
        return self._send[key]

    def _wire(self, parameter: torch.Tensor) -> torch.dtype:
        return self.wire_dtype or parameter.dtype

    def _start(self, bucket: Bucket, part: int) -> None:
        flat = self._buffer(bucket, part)
        self._norms[bucket.index, part] = square_norm(flat)
        if self.collectives.size > 1:
            splits = slice_sizes(bucket.numel, self.collectives.size)
            name = f"{self.label}/bucket{bucket.index}" + (f"/part{part}" if part else "")
            memory = self._receive.setdefault((bucket.index, part), flat.new_empty(0))
            self._handles[bucket.index, part] = self.collectives.alltoall_async(
                flat, splits, name, out=memory
            )

    # At the end of the step

    def finish(self) -> bool:
        self._check_ranks()
        if self._alone:
            self.forget()
            return True
        self.begin_rest()
        workers = self._workers()
        good = usable(workers)
        order = application_order(workers, self.config.order if good else "rank")
        gathering = [(bucket, self._reduce_slice(bucket, order, good)) for bucket in self.buckets]
        for bucket, result in gathering:
            flat = result.wait() if isinstance(result, Handle) else result
            for slot in bucket.slots:
                entry = self.entries[slot.index]
                piece = flat[slot.offset : slot.offset + slot.numel]
                if entry.parameter.grad is None:
                    entry.parameter.grad = self._spare.get(entry)
                self.give_back(entry, piece.view(entry.parameter.shape))
        self.steps += good
        self.unusable_steps += not good
        self.forget()
        return True

    def _workers(self) -> list[VirtualWorker]:
        """All ranks' virtual workers of this step, with the squared lengths of their steps."""
        parts = self.parts_of_step()
        keys = sorted(self._norms)
        lrs = {bucket.index: self._lr(bucket) for bucket in self.buckets}
        norms = torch.stack([self._norms[key].double().cpu() for key in keys]).tolist() if keys else []
        squares = [0.0] * parts
        for (index, part), norm in zip(keys, norms, strict=True):
            squares[part] += lrs[index] ** 2 * norm
        if self._by_microbatch:
            squares = [s if part in self._present else ABSENT for part, s in enumerate(squares)]
        rows = self.agree(squares) if self.collectives.size > 1 else [squares]
        return [VirtualWorker(rank, part, square) for rank, row in enumerate(rows)
                for part, square in enumerate(row) if square != ABSENT]

    def _reduce_slice(self, bucket: Bucket, order: list[VirtualWorker], good: bool) -> Handle | torch.Tensor:
        """Reduce this rank's slice of a bucket and start gathering it."""
        ranks, parts = self.collectives.size, self.parts_of_step()
        if ranks > 1:
            received = [self._handles[bucket.index, part].wait() for part in range(parts)]
            own = slice_sizes(bucket.numel, ranks)[self.collectives.rank]
            # What was sent has arrived: its memory serves for the result.
            out = self._buffer(bucket, 0)[:own]
        else:
            received = [self._buffer(bucket, part) for part in range(parts)]
            own = bucket.numel
            out = self._receive.setdefault((bucket.index, 0), torch.empty_like(received[0]))
        rows = [received[w.part][w.rank * own : (w.rank + 1) * own] for w in order]
        if not rows:
            out.zero_()
        elif good:
            rule = self._recursion(bucket, ranks * parts)
            compensated_sum(rows, rule, self._mean_square(bucket, out), out)
        else:
            plain_sum(rows, out)
        out.div_(ranks)
        if ranks == 1:
            return out
        return self.collectives.allgather_async(
            out, f"{self.label}/bucket{bucket.index}/reduced", out=self._receive[bucket.index, 0]
        )

    def _lr(self, bucket: Bucket) -> float:
        """The learning rate of the bucket's parameter group at this step."""
        lr = self.entries[bucket.slots[0].index].group.get("lr")
        if lr is None:
            raise ValueError(
                "DelayCompensated needs the learning rate of every parameter group, and "
                f"group {bucket.kind.group} has no 'lr'; wrap an optimizer that has one"
            )
        return float(lr)

    def _recursion(self, bucket: Bucket, workers: int) -> Recursion:
        config = self.config
        # Horovod averages over ranks and sums over backward passes; losses are divided by the
        # passes and multiplied by the loss scale. The workers' own gradients are without both.
        scale = float(self.parts_of_step())
        if self.scaler is not None and self.scaler.is_enabled():
            scale /= float(self.scaler.get_scale())
        return Recursion(step=self._lr(bucket) / workers, lam=config.lam,
                         adaptive=config.keeps_mean_square, decay=config.decay, eps=config.eps,
                         cumulative=config.displacement == "cumulative", scale=scale)

    # State

    def _mean_square(self, bucket: Bucket, like: torch.Tensor) -> torch.Tensor | None:
        if not self.config.keeps_mean_square:
            return None
        if bucket.index not in self.mean_square:
            self.mean_square[bucket.index] = torch.zeros(
                like.shape, dtype=accumulation_dtype(like.dtype), device=like.device
            )
        return self.mean_square[bucket.index]

    def _check_ranks(self) -> None:
        """After an elastic change of the number of ranks slices lie elsewhere: start MeanSquare anew."""
        if self._ranks != self.collectives.size:
            if self.mean_square:
                warnings.warn(
                    f"the number of ranks changed from {self._ranks} to {self.collectives.size}: "
                    "DelayCompensated starts MeanSquare anew", stacklevel=4,
                )
            self.reset_state()
            self._ranks = self.collectives.size

    def forget(self) -> None:
        super().forget()
        self._norms.clear()
        self._handles.clear()
        self._present.clear()
        self._spare.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "unusable_steps": self.unusable_steps,
            "mean_square": {index: ms.clone() for index, ms in self.mean_square.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        ranks = max(1, self.collectives.size)
        loaded = {}
        for index, ms in state["mean_square"].items():
            bucket = self.buckets[index] if index < len(self.buckets) else None
            own = slice_sizes(bucket.numel, ranks)[self.collectives.rank] if bucket else None
            if ms.numel() != own:
                raise ValueError(
                    f"MeanSquare of bucket {index} has {ms.numel()} elements in the checkpoint and "
                    f"{own} here: the model, bucket_bytes or groups differ; build the optimizer as "
                    "it was saved, or pass reset_per_rank_state=True"
                )
            device = self.entries[bucket.slots[0].index].parameter.device if bucket else None
            loaded[index] = ms.to(device, copy=True)
        self.mean_square = loaded
        self.steps = state["steps"]
        self.unusable_steps = state["unusable_steps"]

    def reset_state(self) -> None:
        self.mean_square = {}
        self.steps = self.unusable_steps = 0

    def report(self) -> dict[str, Any]:
        held = [*self._send.values(), *self._receive.values(), *self.mean_square.values()]
        return {
            "workers": self.collectives.size * self.parts_of_step(),
            "buckets": len(self.buckets),
            "steps": self.steps,
            "unusable_steps": self.unusable_steps,
            "bytes_held": sum(t.numel() * t.element_size() for t in held),
        }

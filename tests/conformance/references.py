"""What a step of each extension gives, in float64: reductions over all ranks, then the update."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hvd_ext.reducers.buckets import BucketKey, TensorSpec, plan_buckets
from hvd_ext.reducers.powersgd import first_q, plan_matrices
from hvd_ext.reducers.topk import Layout, keep_count
from tests.reference import replies
from tests.reference.delay_compensation import DelayOracle
from tests.reference.powersgd import PowerSGD
from tests.reference.spars_ams import amsgrad_step
from tests.reference.spars_ams import top_k as largest

Vector = npt.NDArray[np.float64]
Reduce = Callable[[Sequence[Vector]], Vector]  # each rank's flat gradient -> the reduced one
LR, MU = 2.0**-4, 0.875  # exact in float32, in which Keras has them


@dataclass(frozen=True)
class Tensors:
    """What is trained.

    Attributes:
        shapes: of the parameters, in their order.
        output_axis: of a matrix: 0 in PyTorch, -1 in TensorFlow.
    """

    shapes: tuple[tuple[int, ...], ...]
    output_axis: int = 0

    @property
    def numels(self) -> list[int]:
        """Elements of each."""
        return [int(np.prod(shape)) for shape in self.shapes]

    @property
    def slices(self) -> list[slice]:
        """Where each is in a flat vector."""
        ends = np.cumsum(self.numels).tolist()
        return [slice(end - numel, end) for end, numel in zip(ends, self.numels, strict=True)]


def total(gradients: Sequence[Vector]) -> Vector:
    """``op=Sum``."""
    return np.sum(gradients, axis=0)


def mean(gradients: Sequence[Vector]) -> Vector:
    """``op=Average``."""
    return np.mean(gradients, axis=0)


def delay(oracle: DelayOracle) -> Reduce:
    """Delay compensation of plain SGD."""
    return lambda gradients: oracle.reduce(gradients, LR)


def top_k(ratio: float | Callable[[int], float], *, per_tensor: bool = False, feedback: bool = True,
          whole: Sequence[int] = ()) -> Callable[[int, Tensors], Reduce]:
    """TopK over one bucket, or by tensor; tensors in ``whole`` are averaged. ``ratio`` may go by the step."""
    def make(ranks: int, tensors: Tensors) -> Reduce:
        packed = [np.arange(s.start, s.stop) for k, s in enumerate(tensors.slices) if k not in whole]
        pieces = packed if per_tensor else [np.concatenate(packed)]
        errors: list[Vector] = [np.zeros(sum(tensors.numels)) for _ in range(ranks)]
        steps = itertools.count()

        def reduce(gradients: Sequence[Vector]) -> Vector:
            result, step = mean(gradients), next(steps)
            kept = ratio(step) if callable(ratio) else ratio
            result[np.concatenate(pieces)] = 0
            for rank, gradient in enumerate(gradients):
                a = gradient + errors[rank]
                for piece in pieces:
                    chosen = piece[largest(a[piece], keep_count(len(piece), kept))]
                    result[chosen] += a[chosen] / ranks
                    a[chosen] = 0
                for k in whole:
                    a[tensors.slices[k]] = 0
                if feedback:
                    errors[rank] = a
            return result

        def skip() -> None:  # taken or skipped, it is a step
            next(steps)

        reduce.skip = skip
        return reduce

    return make


def powersgd(rank: int, **settings: bool) -> Callable[[int, Tensors], Reduce]:
    """Every matrix by its own oracle; what the power iteration begins with is the library's."""
    def make(ranks: int, tensors: Tensors) -> Reduce:
        specs = _routed(tensors)
        oracles = []
        for bucket in plan_buckets(specs):
            if bucket.kind.route != "powersgd":
                continue
            matrices = plan_matrices(bucket, specs, rank, output_axis=tensors.output_axis)
            for one in matrices:
                def first(step: int, one=one, matrices=matrices, index=bucket.index) -> Vector:
                    return one.q.slice_of(first_q(matrices, (0, index, step))).reshape(one.m, one.r)

                oracles.append((tensors.slices[one.slot.index], (one.n, one.m),
                                PowerSGD(first, ranks, **settings)))

        def reduce(gradients: Sequence[Vector]) -> Vector:
            result = mean(gradients)
            for place, shape, oracle in oracles:
                result[place] = oracle.reduce([g[place].reshape(shape) for g in gradients]).ravel()
            return result

        def skip() -> None:  # what a step begins with goes by the steps, taken or skipped
            for _, _, oracle in oracles:
                oracle.steps += 1

        reduce.skip = skip
        return reduce

    return make


def _routed(tensors: Tensors) -> list[TensorSpec]:
    return [TensorSpec("", shape, 8, BucketKey("float64", route="powersgd" if len(shape) > 1 else "dense"))
            for shape in tensors.shapes]


def sign(scale: float) -> Callable[[int, Tensors], Reduce]:
    """signSGD with error feedback of docs/own_reducer.md."""
    def make(ranks: int, tensors: Tensors) -> Reduce:
        errors = np.zeros((ranks, sum(tensors.numels)))

        def reduce(gradients: Sequence[Vector]) -> Vector:
            a = np.asarray(gradients) + errors
            sent = scale * np.sign(a)
            errors[:] = a - sent
            return sent.mean(axis=0)

        return reduce

    return make


def update_of(name: str) -> replies.Update:
    """The wrapped optimizer's step."""
    if name == "sgd":
        return replies.momentum(LR, 0.0)
    if name == "momentum":
        return replies.momentum(LR, MU)
    state: dict[str, Vector] = {}

    def amsgrad(w: Vector, g: Vector) -> Vector:
        for key in ("m", "v", "vhat"):
            state.setdefault(key, np.zeros_like(w))
        return amsgrad_step(w, g, state, lr=LR, beta1=0.9, beta2=0.999, eps=1e-8)

    return amsgrad


def trajectory(reduce: Reduce, update: replies.Update, start: Vector, steps: Sequence[Sequence[Vector]], *,
               late: bool = False, lam: float = 0.0, skipped: int | None = None) -> list[Vector]:
    """The weights after each step.

    Args:
        steps: each step's gradients by rank.
        skipped: the number of a step whose gradient counts for nothing.
        late: each gradient is applied a step later, and the first step changes nothing.
        lam: with ``late``, of the compensation g + lam g g (w_t - w_{t-1}), DC-ASGD eq. 10.
    """
    weights, found = start.copy(), []
    waiting, taken_at = None, start
    for number, gradients in enumerate(steps):
        reduced = reduce(gradients) if number != skipped else getattr(reduce, "skip", lambda: None)()
        if not late:
            weights = weights if reduced is None else update(weights, reduced)
        else:
            before = weights
            if waiting is not None:
                weights = update(weights, waiting + lam * waiting * waiting * (weights - taken_at))
            waiting, taken_at = reduced, before
        found.append(weights.copy())
    return found


# Bytes that one rank sends at a step of float32: the ring sends 2 (M-1)/M of what is averaged.

def gradient_bytes(ranks: int, tensors: Tensors) -> dict[str, float]:
    """Of an allreduce of all gradients."""
    return {"gradients": 2 * (ranks - 1) / ranks * 4 * sum(tensors.numels)}


def entry_bytes(ratio: float) -> Callable[[int, Tensors], dict[str, float]]:
    """Of TopK's messages to all others, one bucket."""
    def count(ranks: int, tensors: Tensors) -> dict[str, float]:
        parts = Layout(keep_count(sum(tensors.numels), ratio), "float64").bytes_by_kind()
        return {kind: (ranks - 1) * size for kind, size in parts.items()}

    return count


def factor_bytes(rank: int) -> Callable[[int, Tensors], dict[str, float]]:
    """Of PowerSGD's P and Q, and of the vectors."""
    def count(ranks: int, tensors: Tensors) -> dict[str, float]:
        ring = 2 * (ranks - 1) / ranks * 4
        specs, factors, dense = _routed(tensors), 0, 0
        for bucket in plan_buckets(specs):
            if bucket.kind.route == "dense":
                dense += bucket.numel
                continue
            for one in plan_matrices(bucket, specs, rank, output_axis=tensors.output_axis):
                factors += (one.n + one.m) * one.r
        return {"factors": ring * factors, "dense": ring * dense}

    return count

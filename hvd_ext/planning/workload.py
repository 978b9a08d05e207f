"""What is trained: the shapes of its gradients, in which order they appear, and how long a pass takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt, prod

from hvd_ext import checks
from hvd_ext.reducers.buckets import BucketKey, TensorSpec

FORWARD = 1 / 3  # of a step's compute
PIECES = 32  # tensors of a model of which only the size is known, and
SMALLEST = 4096  # the fewest elements of one of them


@dataclass(frozen=True)
class Workload:
    """A model's gradients and its compute.

    Args:
        shapes: of the parameters, first layer first; the backward pass yields them last one first.
        compute: seconds of forward and backward pass together, on one rank.
        forward: the forward pass's share; in the backward pass a gradient's share is that of its elements.

    Raises:
        TypeError, ValueError: no parameters, or a time outside its limits.
    """

    shapes: tuple[tuple[int, ...], ...]
    compute: float = 0.0
    forward: float = FORWARD

    def __post_init__(self) -> None:
        checks.check_int("params", self.numel, low=1)
        checks.check_float("compute", self.compute, low=0.0)
        checks.check_float("forward", self.forward, low=0.0, high=1.0)

    @classmethod
    def of_size(cls, numel: int, compute: float = 0.0, pieces: int = PIECES) -> Workload:
        """``numel`` parameters in equal, about square matrices; what does not fit is a vector."""
        checks.check_int("params", numel, low=1)
        pieces = min(pieces, max(1, numel // SMALLEST))
        side = isqrt(numel // pieces)
        matrices = [(side, numel // pieces // side)] * pieces
        rest = numel - sum(map(prod, matrices))
        return cls((*([(rest,)] if rest else []), *matrices), compute)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each tensor."""
        return tuple(prod(shape) for shape in self.shapes)

    @cached_property
    def numel(self) -> int:
        """All elements."""
        return sum(self.sizes)

    def tensor_specs(self, routes: Sequence[str | None] | None = None) -> list[TensorSpec]:
        """The tensors as buckets are planned from; ``routes`` says how each travels."""
        given = routes or [None] * len(self.shapes)
        return [TensorSpec(f"p{number}", shape, 4, BucketKey("float32", route=route))
                for number, (shape, route) in enumerate(zip(self.shapes, given, strict=True))]

"""Where the matrices of a bucket and their factors are, and the Q that a step begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_ext.reducers.buckets import Bucket, TensorSlice, TensorSpec


@dataclass(frozen=True)
class Matrix:
    """One tensor of a bucket as a matrix D (n, m), and its factors' places in the flat messages.

    ``slot`` is its place in the bucket, ``p`` that of P (n, r) among all P of the bucket, ``q``
    that of Q (m, r) among all Q.
    """

    slot: TensorSlice
    n: int
    m: int
    r: int
    p: TensorSlice
    q: TensorSlice


def plan_matrices(bucket: Bucket, specs: Sequence[TensorSpec], rank: int, *,
                  output_axis: int = 0) -> list[Matrix]:
    """The matrices of a bucket, in its order; r is at most n and m.

    Args:
        specs: of all tensors that were planned for.
        output_axis: the axis that the rows (0) or the columns (-1) are: D is (outputs, rest) or
            (rest, outputs), the tensor's own memory order in either case.
    """
    found: list[Matrix] = []
    p_at = q_at = 0
    for number, slot in enumerate(bucket.slots):
        shape = specs[slot.index].shape
        outputs, rest = shape[output_axis], prod(shape) // shape[output_axis]
        n, m = (outputs, rest) if output_axis == 0 else (rest, outputs)
        r = min(rank, n, m)
        found.append(Matrix(slot, n, m, r, TensorSlice(number, p_at, n * r),
                            TensorSlice(number, q_at, m * r)))
        p_at, q_at = p_at + n * r, q_at + m * r
    return found


def factor_sizes(found: Sequence[Matrix]) -> tuple[int, int]:
    """Numbers in the two messages of a bucket: all P, all Q."""
    return sum(one.p.numel for one in found), sum(one.q.numel for one in found)


def first_q(found: Sequence[Matrix], seed: tuple[int, ...]) -> npt.NDArray[Any]:
    """All Q of a bucket, drawn from a normal distribution, flat float64; the same on every rank."""
    return np.random.default_rng(list(seed)).standard_normal(factor_sizes(found)[1])

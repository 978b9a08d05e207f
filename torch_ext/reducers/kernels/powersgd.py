"""What PowerSGD computes on tensors. No collectives, no state.

Shapes: D (n, m) one gradient matrix, P (n, r), Q (m, r), r the rank. A bucket's matrices, all P and
all Q are flat tensors with the places of :class:`hvd_ext.reducers.powersgd.Matrix`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvd_ext.reducers.powersgd import Matrix, factor_sizes


def left_factors(total: torch.Tensor, q: torch.Tensor, found: Sequence[Matrix]) -> torch.Tensor:
    """``P <- D Q`` of all matrices, flat (Vogels et al., Algorithm 1, line 3)."""
    p = total.new_empty(factor_sizes(found)[0])
    for one in found:
        torch.mm(one.slot.slice_of(total).view(one.n, one.m), one.q.slice_of(q).view(one.m, one.r),
                 out=one.p.slice_of(p).view(one.n, one.r))
    return p


def orthogonalize_columns(p: torch.Tensor, found: Sequence[Matrix]) -> None:
    """Make the columns of every P orthonormal, in place (Algorithm 1, line 5)."""
    for one in found:
        view = one.p.slice_of(p).view(one.n, one.r)
        view.copy_(torch.linalg.qr(view).Q)


def right_factors(total: torch.Tensor, p: torch.Tensor, found: Sequence[Matrix],
                  out: torch.Tensor) -> torch.Tensor:
    """``Q <- D^T P`` of all matrices, flat, into ``out`` (Algorithm 1, line 6)."""
    for one in found:
        torch.mm(one.slot.slice_of(total).view(one.n, one.m).t(), one.p.slice_of(p).view(one.n, one.r),
                 out=one.q.slice_of(out).view(one.m, one.r))
    return out


def expand_factors(p: torch.Tensor, q: torch.Tensor, found: Sequence[Matrix], left: torch.Tensor,
                   mean: torch.Tensor) -> None:
    """``mean <- P Q^T``, and ``left <- left - P Q^T``, the new residual (Algorithm 2, lines 7-9).

    ``left`` and ``mean`` may be the same memory: there is no residual then.
    """
    for one in found:
        product = one.slot.slice_of(mean).view(one.n, one.m)
        factors = one.p.slice_of(p).view(one.n, one.r), one.q.slice_of(q).view(one.m, one.r).t()
        torch.mm(*factors, out=product)
        if left is not mean:
            one.slot.slice_of(left).view(one.n, one.m).sub_(product)

"""Kernels of SENG: tensors in, tensors out.

The symbols, in every docstring and in this order of axes, the same in both front ends:

=====================  =========================================================================
M                      ranks
rho                    samples of one rank that the curvature is taken from
n_G, n_A               rows of G_i and of A_i: one group's gradient matrix is n_G x n_A
kappa                  columns of a sample's factors (positions of a convolution)
r                      columns left of them after the SVD
q, zeta_G, zeta_A      sampled rows of U, of G and of A
U, Xi                  (rho, n) per-sample gradients, (rho, q) their sampled rows, weighted
captured factors       (rho, groups, kappa, n)
kept factors           (groups, n, r, rho): a sum over samples is a matrix-vector product
=====================  =========================================================================

The factor ``1/sqrt(rho)`` of U is part of U and of G.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from hvd_ext.seng import jitter_sequence
from hvd_ext.torch.seng.implicit_unfold import ImplicitUnfold

CHUNK_ROWS = 1 << 14
GRAM_BLOCK = 1 << 22


def to_compute_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 when it is stored in half precision."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if half else tensor


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no element is infinite or NaN."""
    dense = [t.detach().coalesce().values() if t.is_sparse else t.detach() for t in tensors]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    dense = [tensor for tensor in dense if tensor.is_floating_point() or tensor.is_complex()]
    for tensor in dense:
        by_device.setdefault(tensor.device, []).append(tensor)
    # A norm lets nothing infinite through, and those of all tensors are one call; only when one is not
    # finite, which finite but large numbers can cause too, every element is looked at.
    if all(bool(torch.isfinite(torch.stack(torch._foreach_norm(some))).all())
           for some in by_device.values()):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in dense)


def stack_as_view(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack equal-shaped tensors; their common base, without a copy, if they are its consecutive rows."""
    base = tensors[0]._base
    if base is not None and base.shape == (len(tensors), *tensors[0].shape) and base.is_contiguous():
        size, start = tensors[0].numel() * base.element_size(), base.data_ptr()
        if all(one._base is base and one.is_contiguous() and one.data_ptr() == start + k * size
               for k, one in enumerate(tensors)):
            return base
    return torch.stack(list(tensors))


def per_sample_products(g: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """``u_i = vec(G_i A_i^T)`` (SENG eq. 3).

    Args:
        g: (rho, groups, kappa, n_G).
        a: (rho, groups, kappa, n_A).

    Returns:
        (rho, groups n_G n_A).
    """
    return torch.matmul(g.mT, a).flatten(1)


def truncate_rank(g: torch.Tensor, a: torch.Tensor | ImplicitUnfold, rank: int, *, always: bool = False
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut each sample's factors to ``rank`` columns by an SVD of the smaller one (SENG eq. 15).

    With G = Q S V^T the smaller, ``G <- Q_r S_r`` and ``A <- A V_r``; the other way round when A is
    smaller. The SVD comes from the eigenvectors of the smaller Gram matrix. Signs are fixed so
    that the columns of A sum to something not negative: eq. 23 adds columns over samples.

    Args:
        g: (..., kappa, n_G), a: (..., kappa, n_A), finite. An ``a`` that is :class:`ImplicitUnfold` has
            n_A >= n_G and kappa > rank.
        always: also when kappa <= rank, so that columns are those of the SVD.

    Returns:
        Both with min(kappa, rank, n_G, n_A) columns, or unchanged when kappa <= rank.
    """
    kappa = g.shape[-2]
    swap = False
    if isinstance(a, torch.Tensor):
        if kappa <= rank and not (always and kappa > 1):
            return g, a
        swap = a.shape[-1] < g.shape[-1]
    small = a.mT if swap and isinstance(a, torch.Tensor) else g.mT
    rank = min(rank, small.shape[-2], kappa)
    if kappa <= small.shape[-2]:
        _, vectors = torch.linalg.eigh(small.mT @ small)
        right = vectors[..., -rank:].flip(-1)
        small = small @ right
    else:
        values, vectors = torch.linalg.eigh(small @ small.mT)
        left = vectors[..., -rank:].flip(-1)
        lengths = values[..., -rank:].flip(-1).clamp_min(0.0).sqrt()
        tiny = lengths[..., :1] * torch.finfo(lengths.dtype).eps ** 0.5
        inverse = torch.where(lengths > tiny, 1.0 / lengths, 0.0)
        right = (small.mT @ left) * inverse.unsqueeze(-2)
        small = left * lengths.unsqueeze(-2)
    other = (g if swap else a).mT @ right if isinstance(a, torch.Tensor) else a.multiply(right)
    new_g, new_a = (other, small) if swap else (small, other)
    signs = torch.where(new_a.sum(-2, keepdim=True) < 0, -1.0, 1.0).to(new_a.dtype)
    return (new_g * signs).mT, (new_a * signs).mT


def effective_rank(g: torch.Tensor, a: torch.Tensor, least: float) -> int:
    """How many of the columns that ``truncate`` gave, (..., columns, n), must stay so that all others
    together are at most ``least`` of ``||U||_F^2``. Terms of different columns are orthogonal in each sample.
    """
    energy = (g.square().sum(-1) * a.square().sum(-1)).flatten(0, -2).sum(0)
    behind = energy.flip(0).cumsum(0)  # of the last one, two, ... columns
    return max(1, len(energy) - int((behind <= least).sum()))


def samples_last(factor: torch.Tensor) -> torch.Tensor:
    """(rho, groups, r, n) as (groups, n, r, rho)."""
    # A copy always: with one sample it could be a view of what the layer was given.
    return factor.permute(1, 3, 2, 0).clone(memory_format=torch.contiguous_format)


def samples_first(factor: torch.Tensor) -> torch.Tensor:
    """(groups, n, r, rho) as (rho, groups, r, n)."""
    return factor.permute(3, 0, 2, 1).contiguous()


def pad_columns(factor: torch.Tensor, r: int) -> torch.Tensor:
    """(groups, n, r', rho) with zero columns added up to ``r`` of them for each sample."""
    missing = r - factor.shape[2]
    return F.pad(factor, (0, 0, 0, missing)) if missing > 0 else factor


def gram_explicit(xi: torch.Tensor) -> torch.Tensor:
    """``Xi^T Xi`` (SENG eq. 12) of ``xi`` (rho, q) in its precision, bfloat16 summed in float32."""
    if xi.dtype not in (torch.bfloat16, torch.float16):
        return xi @ xi.mT
    total = xi.new_zeros((xi.shape[0], xi.shape[0]), dtype=torch.float32)
    for start in range(0, xi.shape[1], CHUNK_ROWS):
        part = xi[:, start:start + CHUNK_ROWS].float()
        total.addmm_(part, part.mT)
    return total


def gram_implicit(xg: torch.Tensor, xa: torch.Tensor) -> torch.Tensor:
    """``(u_i)^T u_j ~ elesum((Xi_Ai^T Xi_Aj) o (Xi_Gi^T Xi_Gj))`` (SENG eq. 21), summed over groups.

    Args:
        xg: (groups, zeta_G, r, rho), xa: (groups, zeta_A, r, rho).

    Returns:
        (rho, rho).
    """
    rho = xg.shape[-1]
    xg, xa = xg.flatten(2), xa.flatten(2)
    columns = xg.shape[-1]
    total = xg.new_zeros((rho, rho))
    step = max(rho, GRAM_BLOCK // max(1, columns * xg.shape[0]) // rho * rho)
    for start in range(0, columns, step):
        part = slice(start, start + step)
        product = (xa[..., part].mT @ xa).mul_(xg[..., part].mT @ xg).sum(0)
        total += product.view(-1, rho, columns // rho, rho).sum((0, 2))
    return total


def project_explicit(xi: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """``Xi^T z`` for ``xi`` (rho, q) and ``z`` (q,): (rho,)."""
    if xi.dtype == z.dtype:
        return torch.mv(xi, z)
    total = z.new_zeros(xi.shape[0])
    for start in range(0, z.numel(), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        total.addmv_(xi[:, part].to(z.dtype), z[part])
    return total


def project_implicit(xg: torch.Tensor, xa: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """``u_i^T z ~ elesum((Xi_z^T Xi_Gi) o Xi_Ai)`` (SENG eq. 19), summed over groups.

    Args:
        xg: (groups, zeta_G, r, rho), xa: (groups, zeta_A, r, rho), z: (groups, zeta_G, zeta_A),
            with the weights of Omega_G and Omega_A already in all three.

    Returns:
        (rho,).
    """
    total = torch.matmul(z.mT, xg.flatten(2)).mul_(xa.flatten(2)).sum((0, 1))
    return total.view(-1, xg.shape[-1]).sum(0)


def expand_explicit(u: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out <- U b`` (SENG eq. 25) for ``u`` (rho, n), ``b`` (rho,), ``out`` (n,)."""
    if u.dtype == b.dtype:
        return torch.mv(u.t(), b, out=out)
    for start in range(0, out.numel(), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        torch.mv(u[:, part].to(b.dtype).t(), b, out=out[part])
    return out


def subtract_explicit(gradient: torch.Tensor, u: torch.Tensor, b: torch.Tensor,
                      lam: float) -> None:
    """``gradient <- (gradient - U b) / lam`` in place (SENG eq. 8), gradient (n,)."""
    if u.dtype == b.dtype:
        gradient.addmv_(u.t(), b, beta=1.0 / lam, alpha=-1.0 / lam)
        return
    for start in range(0, gradient.numel(), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        gradient[part].addmv_(u[:, part].to(b.dtype).t(), b, beta=1.0 / lam, alpha=-1.0 / lam)


def exact_terms(g: torch.Tensor, a: torch.Tensor, c: torch.Tensor
                ) -> tuple[torch.Tensor, torch.Tensor]:
    """L and R with ``U c = L R^T`` (SENG eq. 22), one product instead of one per sample.

    Args:
        g: (groups, n_G, r, rho), a: (groups, n_A, r, rho), c: (rho,).

    Returns:
        (groups, n_G, r rho) and (groups, n_A, r rho).
    """
    return (g * c).flatten(2), a.flatten(2)


def factored_means(g: torch.Tensor, a: torch.Tensor, c: torch.Tensor, total: torch.Tensor
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum_i sqrt|c_i| G_i`` and ``sum_i c_i/total A_i`` (SENG eq. 23), zero where total is zero.

    Args:
        g: (groups, n_G, r, rho), a: (groups, n_A, r, rho), c: (rho,),
            total: ``sum_i sqrt|c_i|``, a tensor of no dimension.

    Returns:
        (groups, n_G, r) and (groups, n_A, r).
    """
    weights = torch.where(total > 0, c / total, 0.0)
    return torch.matmul(g, c.abs().sqrt()), torch.matmul(a, weights)


def factor_gram(gram: torch.Tensor, lam: float) -> tuple[torch.Tensor | None, float]:
    """Cholesky factor of ``lam I + gram`` in float64, and the jitter it took; None when it has none.

    Args:
        gram: (rho, rho), finite or not.
    """
    gram = gram.double()
    mean = float(gram.diagonal().mean())
    if not math.isfinite(mean):
        return None, 0.0
    for jitter in jitter_sequence(mean):
        shifted = gram.clone()
        shifted.diagonal().add_(lam + jitter)
        lower, info = torch.linalg.cholesky_ex(shifted)
        # Whatever is not finite anywhere in the matrix reaches the factor's diagonal.
        if int(info) == 0 and math.isfinite(float(lower.diagonal().sum())):
            return lower, jitter
    return None, 0.0


def factor_all(grams: torch.Tensor, lam: float) -> tuple[torch.Tensor, list[float], list[bool]]:
    """:func:`factor_gram` of several at once: the factors, the jitters they took, and which have one.

    Args:
        grams: (L, rho, rho) float64, finite or not.
    """
    shifted = grams.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(lam)
    lower, info = torch.linalg.cholesky_ex(shifted)
    sums = lower.diagonal(dim1=1, dim2=2).sum(1)
    good: list[bool] = torch.where(info == 0, sums.isfinite(), False).tolist()
    jitters = [0.0] * len(good)
    for k, fine in enumerate(good):
        if not fine:
            own, jitters[k] = factor_gram(grams[k], lam)
            if own is not None:
                lower[k], good[k] = own, True
    return lower, jitters, good


def solve_system(lower: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """``b = (lam I + U^T U)^{-1} rhs`` (SENG eq. 9) of L systems, in rhs's precision.

    Args:
        lower: (L, rho, rho) float64, the Cholesky factors.
        rhs: (L, rho).

    Returns:
        (L, rho).
    """
    return torch.cholesky_solve(rhs.double().unsqueeze(2), lower).squeeze(2).to(rhs.dtype)

"""SENG in float64 NumPy from its definitions: U is a dense n × rho matrix, nothing is sketched cleverly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def dense_u(per_sample: Array) -> Array:
    """``U = [u_1 ... u_rho]/sqrt(rho)`` (eq. 5) from per-sample gradients (rho, n): (n, rho)."""
    return np.asarray(per_sample, np.float64).T / np.sqrt(len(per_sample))


def direction(u: Array, g: Array, lam: float) -> Array:
    """``(U U^T + lam I)^{-1} g`` by a dense n × n solve."""
    return np.linalg.solve(u @ u.T + lam * np.eye(len(g)), g)


def bound_direction(u: Array, g: Array, lam: float) -> Array:
    """The direction with g itself as one more column of U."""
    return direction(np.column_stack([u, g]), g, lam)


def sketched_direction(u: Array, g: Array, lam: float, omega: Array) -> Array:
    """``(g - U b)/lam`` with b of the sketched problem (eq. 11-13), Omega a dense (q, n) matrix."""
    xi = omega @ u
    b = np.linalg.lstsq(
        np.vstack([xi, np.sqrt(lam) * np.eye(u.shape[1])]),
        np.concatenate([omega @ g, np.zeros(u.shape[1])]), rcond=None)[0]
    return (g - u @ b) / lam


def coefficients(u: Array, g: Array, lam: float) -> Array:
    """``b`` of eq. 9."""
    return np.linalg.solve(lam * np.eye(u.shape[1]) + u.T @ u, u.T @ g)


def factored_product(g_factors: Sequence[Array], a_factors: Sequence[Array], c: Array) -> Array:
    """``C_U(c)`` of eq. 23, sample by sample; factors (n_G, r), (n_A, r): (n_G, n_A)."""
    total = sum(np.sqrt(abs(ci)) for ci in c)
    if total == 0:
        return np.zeros((g_factors[0].shape[0], a_factors[0].shape[0]))
    left = sum(np.sqrt(abs(ci)) * gi for ci, gi in zip(c, g_factors, strict=True))
    right = sum(ci / total * ai for ci, ai in zip(c, a_factors, strict=True))
    return left @ right.T


def fewest_columns(g_factors: Array, a_factors: Array, lam: float) -> int:
    """The columns of the smaller factor's SVD that must stay, such that all others are at most 0.05^2 lam of
    the squared norm of U; factors (rho, groups, kappa, n_G) and (rho, groups, kappa, n_A)."""
    energies = []
    for g, a in zip(g_factors.reshape(-1, *g_factors.shape[2:]), a_factors.reshape(-1, *a_factors.shape[2:]),
                    strict=True):
        small, other = (a, g) if a.shape[1] < g.shape[1] else (g, a)
        left, lengths, _ = np.linalg.svd(small, full_matrices=False)
        energies.append(lengths**2 * np.square(left.T @ other).sum(1))
    behind = np.cumsum(np.sum(energies, 0)[::-1])[::-1]
    return max(1, int((behind > 0.05**2 * lam).sum()))


def block_direction(us: Sequence[Array], g: Array, lam: float, lagged: Array | None = None) -> Array:
    """Eq. 26 as the mean of every rank's own natural gradient; eq. 27 with the former gradient."""
    if lagged is None:
        return np.mean([direction(u, g, lam) for u in us], axis=0)
    return (g - np.mean([u @ coefficients(u, lagged, lam) for u in us], axis=0)) / lam


def joint_direction(us: Sequence[Array], g: Array, lam: float) -> Array:
    """All ranks' samples in one matrix ``[U_1 ... U_M]/sqrt(M)``."""
    return direction(np.hstack(us) / np.sqrt(len(us)), g, lam)

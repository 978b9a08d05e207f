"""Kernels of SENG: tensors in, tensors out.

Shapes: rho samples, n parameters of a layer, n_G x n_A one group's gradient matrix, kappa columns
of a sample's factors, r the columns kept, q (zeta_G, zeta_A) sampled rows. U and Xi are kept sample
by sample, (rho, n) and (rho, q), factors as (rho, groups, n_G, r) and (rho, groups, n_A, r); the
factor ``1/sqrt(rho)`` of U is part of U and of G.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from hvd_ext.seng import Settings, generator, jitters, sample_batch, sample_rows


def scaled(per_sample: tf.Tensor, settings: Settings, step: tf.Tensor, *others: tf.Tensor
           ) -> tuple[tf.Tensor, ...]:
    """U of SENG eq. 5 from what a backward pass gave each sample.

    Args:
        per_sample: (rho, ...), gradients or factors G, of a loss that is the mean or the sum over
            the rho samples.
        settings: say which of the two, a constant factor of the loss, and how many samples to
            keep.
        step: 0-D int64, of the choice of samples.
        others: (rho, ...), of which the same samples are kept, not scaled.
    """
    rho = tf.cast(tf.shape(per_sample)[0], per_sample.dtype)
    if settings.subsample is not None:
        def choose(rho_now: np.ndarray, step_now: np.ndarray) -> np.ndarray:
            chosen = sample_batch(int(rho_now), settings.subsample,
                                  generator(settings.seed, int(step_now), "batch"))
            return np.arange(int(rho_now), dtype=np.int64) if chosen is None else chosen

        picked = tf.numpy_function(choose, [tf.shape(per_sample)[0], step], tf.int64)
        picked = tf.ensure_shape(picked, (None,))
        per_sample, *rest = (tf.gather(tensor, picked) for tensor in (per_sample, *others))
        others = tuple(rest)
    kept = tf.cast(tf.shape(per_sample)[0], per_sample.dtype)
    factor = rho if settings.loss_reduction == "mean" else tf.ones((), per_sample.dtype)
    factor = factor / (tf.sqrt(tf.maximum(kept, 1.0)) * settings.loss_scale)
    return per_sample * factor, *others


def choose_rows(n: int, q: int, scores: tf.Tensor | None, settings: Settings, step: tf.Tensor,
                label: str) -> tuple[tf.Tensor, tf.Tensor]:
    """q of n rows and their weights (SENG eq. 14): (q,) int64 and (q,) float32.

    ``scores`` (n,) are squared row norms for leverage sampling, None for uniform.
    """
    by_leverage = scores is not None
    scores = tf.zeros((0,)) if scores is None else scores

    def choose(scores_now: np.ndarray, step_now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        known = scores_now.astype(np.float64) if by_leverage else None
        if known is not None and not np.isfinite(known).all():
            known = None  # the curvature is refused for it afterwards
        rows, weights = sample_rows(n, q, generator(settings.seed, int(step_now), label),
                                    scores=known, replacement=settings.replacement)
        return rows, weights.astype(np.float32)

    rows, weights = tf.numpy_function(choose, [scores, step], [tf.int64, tf.float32])
    return tf.ensure_shape(rows, (q,)), tf.ensure_shape(weights, (q,))


def factor(gram: tf.Tensor, lam: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Cholesky factor of ``lam I + gram`` in float64 with the jitter it needs, and whether it has one.

    Args:
        gram: (rho, rho), finite or not.
        lam: 0-D float64.
    """
    def by_numpy(gram_now: np.ndarray, lam_now: np.ndarray) -> tuple[np.ndarray, np.bool_]:
        size = len(gram_now)
        if size and np.isfinite(gram_now).all():
            for jitter in jitters(float(np.trace(gram_now)) / size):
                try:
                    lower = np.linalg.cholesky(gram_now + (lam_now + jitter) * np.eye(size))
                except np.linalg.LinAlgError:
                    continue
                if np.isfinite(lower).all():
                    return lower, np.bool_(True)
        return np.eye(size), np.bool_(False)

    lower, good = tf.numpy_function(by_numpy, [tf.cast(gram, tf.float64), lam],
                                    [tf.float64, tf.bool])
    return tf.ensure_shape(lower, (None, None)), tf.ensure_shape(good, ())


def coefficients(lower: tf.Tensor, rhs: tf.Tensor) -> tf.Tensor:
    """``b = (lam I + Xi^T Xi)^{-1} rhs`` (SENG eq. 9, 12) from the Cholesky factor: (rho,)."""
    solved = tf.linalg.cholesky_solve(lower, tf.cast(rhs, tf.float64)[:, None])[:, 0]
    return tf.cast(solved, rhs.dtype)


def truncate(g: tf.Tensor, a: tf.Tensor, rank: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Cut each sample's factors to ``rank`` columns by an SVD of the smaller one (SENG eq. 15).

    With G = Q S V^T the smaller, ``G <- Q_r S_r`` and ``A <- A V_r``; the other way round when A is
    smaller. The SVD comes from the eigenvectors of the smaller Gram matrix. Signs are fixed so
    that the columns of A sum to something not negative: eq. 23 adds columns over samples.

    Args:
        g: (..., n_G, kappa), a: (..., n_A, kappa), of known shape but for the samples.

    Returns:
        Both with min(kappa, rank, n_G, n_A) columns, or unchanged when kappa <= rank.
    """
    kappa = g.shape[-1]
    if kappa <= rank:
        return g, a
    swap = a.shape[-2] < g.shape[-2]
    small, other = (a, g) if swap else (g, a)
    rank = min(rank, small.shape[-2])
    if kappa <= small.shape[-2]:
        _, vectors = tf.linalg.eigh(tf.matmul(small, small, transpose_a=True))
        right = tf.reverse(vectors[..., -rank:], [-1])
        small = tf.matmul(small, right)
    else:
        values, vectors = tf.linalg.eigh(tf.matmul(small, small, transpose_b=True))
        left = tf.reverse(vectors[..., -rank:], [-1])
        lengths = tf.sqrt(tf.maximum(tf.reverse(values[..., -rank:], [-1]), 0.0))
        tiny = lengths[..., :1] * float(np.finfo(np.float32).eps) ** 0.5
        inverse = tf.where(lengths > tiny, 1.0 / lengths, tf.zeros_like(lengths))
        right = tf.matmul(small, left, transpose_a=True) * inverse[..., None, :]
        small = left * lengths[..., None, :]
    other = tf.matmul(other, right)
    g, a = (other, small) if swap else (small, other)
    signs = tf.where(tf.reduce_sum(a, axis=-2, keepdims=True) < 0, -1.0, 1.0)
    return g * signs, a * signs


def gram_implicit(xg: tf.Tensor, xa: tf.Tensor) -> tf.Tensor:
    """``(u_i)^T u_j ~ elesum((Xi_Ai^T Xi_Aj) o (Xi_Gi^T Xi_Gj))`` (SENG eq. 21), summed over groups.

    Args:
        xg: (rho, groups, zeta_G, r), xa: (rho, groups, zeta_A, r).

    Returns:
        (rho, rho).
    """
    products = tf.einsum("igzr,jgzs->gijrs", xg, xg) * tf.einsum("igyr,jgys->gijrs", xa, xa)
    return tf.reduce_sum(products, axis=(0, 3, 4))


def project_implicit(xg: tf.Tensor, xa: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
    """``u_i^T z ~ elesum((Xi_z^T Xi_Gi) o Xi_Ai)`` (SENG eq. 19), summed over groups: (rho,).

    Args:
        xg: (rho, groups, zeta_G, r), xa: (rho, groups, zeta_A, r), z: (groups, zeta_G, zeta_A),
            with the weights of Omega_G and Omega_A in all three.
    """
    return tf.einsum("igyr,igyr->i", tf.einsum("gzy,igzr->igyr", z, xg), xa)


def factored_means(g: tf.Tensor, a: tf.Tensor, c: tf.Tensor,
                   total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """``sum_i sqrt|c_i| G_i`` and ``sum_i c_i/total A_i`` (SENG eq. 23), zero where total is zero.

    Args:
        g: (rho, groups, n_G, r), a: (rho, groups, n_A, r), c: (rho,),
            total: ``sum_i sqrt|c_i|``, 0-D.

    Returns:
        (groups, n_G, r) and (groups, n_A, r).
    """
    weights = tf.where(total > 0, c / total, tf.zeros_like(c))
    return (tf.einsum("igor,i->gor", g, tf.sqrt(tf.abs(c))),
            tf.einsum("igar,i->gar", a, weights))


def expand_exact(g: tf.Tensor, a: tf.Tensor, c: tf.Tensor) -> tf.Tensor:
    """``U c`` of SENG eq. 22 as one product: (groups, n_G, n_A)."""
    return tf.einsum("igor,igar->goa", g * c[:, None, None, None], a)

"""Kernels of SENG: tensors in, tensors out.

Shapes: rho samples, n parameters of a layer, q sampled rows. U and Xi are kept sample by sample,
(rho, n) and (rho, q); the factor ``1/sqrt(rho)`` of U is part of them.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from hvd_ext.seng import Settings, generator, jitters, sample_batch, sample_rows


def scaled(u: tf.Tensor, settings: Settings, step: tf.Tensor) -> tf.Tensor:
    """U of SENG eq. 5 from the gradients that a backward pass gave each sample.

    Args:
        u: (rho, n), of a loss that is the mean or the sum over the rho samples.
        settings: say which of the two, a constant factor of the loss, and how many samples to
            keep.
        step: 0-D int64, of the choice of samples.
    """
    rho = tf.cast(tf.shape(u)[0], u.dtype)
    if settings.subsample is not None:
        def choose(rho_now: np.ndarray, step_now: np.ndarray) -> np.ndarray:
            chosen = sample_batch(int(rho_now), settings.subsample,
                                  generator(settings.seed, int(step_now), "batch"))
            return np.arange(int(rho_now), dtype=np.int64) if chosen is None else chosen

        u = tf.gather(u, tf.numpy_function(choose, [tf.shape(u)[0], step], tf.int64))
    kept = tf.cast(tf.shape(u)[0], u.dtype)
    factor = rho if settings.loss_reduction == "mean" else tf.ones((), u.dtype)
    return u * factor / (tf.sqrt(tf.maximum(kept, 1.0)) * settings.loss_scale)


def choose_rows(u: tf.Tensor, q: int, settings: Settings, step: tf.Tensor,
                label: str) -> tuple[tf.Tensor, tf.Tensor]:
    """q rows of U and their weights (SENG eq. 14): (q,) int64 and (q,) float32."""
    n = u.shape[1]
    by_leverage = settings.sketch == "leverage"
    scores = tf.reduce_sum(u * u, axis=0) if by_leverage else tf.zeros((0,))

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


def coefficients(lower: tf.Tensor, xi: tf.Tensor, xi_of_g: tf.Tensor, ranks: int) -> tf.Tensor:
    """``b = (lam I + Xi^T Xi)^{-1} Xi^T xi`` (SENG eq. 9, 12).

    Args:
        lower: Cholesky factor of ``lam I + Xi^T Xi``, with Xi divided by sqrt(ranks).
        xi: (rho, q), without that division.
        xi_of_g: (q,), the gradient's rows with the weights of Omega.
        ranks: how many ranks' samples stand in Xi.
    """
    rhs = tf.linalg.matvec(xi, xi_of_g) / float(np.sqrt(ranks))
    solved = tf.linalg.cholesky_solve(lower, tf.cast(rhs, tf.float64)[:, None])[:, 0]
    return tf.cast(solved, xi.dtype)

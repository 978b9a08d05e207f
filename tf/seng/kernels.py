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

The factor ``1/sqrt(rho)`` of U is part of U and of G. A gradient's matrix is (groups, n_A, n_G),
which Keras' kernels are without a transpose where there is one group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from hvd_ext.seng import Settings, jitter_sequence, sample_batch, sample_rows, seeded_generator, usable_scores


def choose_samples(rho: tf.Tensor, settings: Settings, step: tf.Tensor) -> tf.Tensor:
    """The samples of a batch of ``rho`` that the curvature is taken from: (kept,) int64."""
    def choose(rho_now: np.ndarray, step_now: np.ndarray) -> np.ndarray:
        chosen = sample_batch(int(rho_now), settings.subsample,
                              seeded_generator(settings.seed, int(step_now), "samples"))
        return np.arange(int(rho_now), dtype=np.int64) if chosen is None else chosen

    return tf.ensure_shape(tf.numpy_function(choose, [rho, step], tf.int64), (None,))


def choose_rows(n: int, q: int, scores: tf.Tensor | None, settings: Settings, step: tf.Tensor,
                label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """q of n rows and their weights (SENG eq. 14): (q,) int64 and (q,) float64.

    ``scores`` (n,) are squared row norms for leverage sampling, None for uniform; ``label`` is a 0-D
    string.
    """
    by_leverage = scores is not None
    scores = tf.zeros((0,)) if scores is None else scores

    def choose(scores_now: np.ndarray, step_now: np.ndarray, label_now: bytes
               ) -> tuple[np.ndarray, np.ndarray]:
        known = usable_scores(scores_now) if by_leverage else None
        return sample_rows(n, q, seeded_generator(settings.seed, int(step_now), label_now.decode()),
                           scores=known,
                           replacement=settings.replacement)

    rows, weights = tf.numpy_function(choose, [scores, step, label], [tf.int64, tf.float64])
    return tf.ensure_shape(rows, (q,)), tf.ensure_shape(weights, (q,))


def factor_gram(gram: tf.Tensor, lam: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Cholesky factor of ``lam I + gram`` in float64, the jitter it took, and whether it has one.

    Args:
        gram: (rho, rho), finite or not.
        lam: 0-D float64.
    """
    def by_numpy(gram_now: np.ndarray, lam_now: np.ndarray) -> tuple[Any, Any, Any]:
        size = len(gram_now)
        if size and np.isfinite(gram_now).all():
            for jitter in jitter_sequence(float(np.trace(gram_now)) / size):
                try:
                    lower = np.linalg.cholesky(gram_now + (lam_now + jitter) * np.eye(size))
                except np.linalg.LinAlgError:
                    continue
                if np.isfinite(lower).all():
                    return lower, np.float64(jitter), np.bool_(True)
        return np.eye(size), np.float64(0.0), np.bool_(False)

    lower, jitter, good = tf.numpy_function(by_numpy, [tf.cast(gram, tf.float64), lam],
                                            [tf.float64, tf.float64, tf.bool])
    return (tf.ensure_shape(lower, (None, None)), tf.ensure_shape(jitter, ()),
            tf.ensure_shape(good, ()))


def solve_system(lower: tf.Tensor, rhs: tf.Tensor) -> tf.Tensor:
    """``b = (lam I + Xi^T Xi)^{-1} rhs`` (SENG eq. 9, 12) from the Cholesky factor: (rho,)."""
    solved = tf.linalg.cholesky_solve(lower, tf.cast(rhs, tf.float64)[:, None])[:, 0]
    return tf.cast(solved, rhs.dtype)


def truncate_rank(g: tf.Tensor, a: tf.Tensor, rank: int, least: int, *, always: bool = False
                  ) -> tuple[tf.Tensor, tf.Tensor]:
    """Cut each sample's factors to ``rank`` columns by an SVD of the smaller one (SENG eq. 15).

    With G = Q S V^T the smaller, ``G <- Q_r S_r`` and ``A <- A V_r``; the other way round when A is
    smaller. The SVD comes from the eigenvectors of the smaller Gram matrix. Signs are fixed so
    that the columns of A sum to something not negative: eq. 23 adds columns over samples.

    Args:
        g: (rho, groups, kappa, n_G), a: (rho, groups, kappa, n_A), n_G and n_A known.
        least: what kappa is at least, so that less needs to be decided when it runs.
        always: also when kappa <= rank, so that columns are those of the SVD.

    Returns:
        Both with min(kappa, rank, n_G, n_A) columns, or unchanged when kappa <= rank.
    """
    kappa = tf.shape(g)[2]
    swap = a.shape[-1] < g.shape[-1]
    small, other = (a, g) if swap else (g, a)
    width = int(small.shape[-1])
    kept = min(rank, width)

    def of_columns() -> tuple[tf.Tensor, tf.Tensor]:
        _, vectors = tf.linalg.eigh(tf.matmul(small, small, transpose_b=True))
        right = tf.reverse(vectors[..., -kept:], [-1])
        return (tf.matmul(right, small, transpose_a=True),
                tf.matmul(right, other, transpose_a=True))

    def of_rows() -> tuple[tf.Tensor, tf.Tensor]:
        values, vectors = tf.linalg.eigh(tf.matmul(small, small, transpose_a=True))
        left = tf.reverse(vectors[..., -kept:], [-1])
        lengths = tf.sqrt(tf.maximum(tf.reverse(values[..., -kept:], [-1]), 0.0))
        tiny = lengths[..., :1] * float(np.finfo(small.dtype.as_numpy_dtype).eps) ** 0.5
        inverse = tf.where(lengths > tiny, 1.0 / lengths, tf.zeros_like(lengths))
        right = tf.matmul(small, left) * inverse[..., None, :]
        return (tf.linalg.matrix_transpose(left * lengths[..., None, :]),
                tf.matmul(right, other, transpose_a=True))

    def cut() -> tuple[tf.Tensor, tf.Tensor]:
        if least > width:
            first, second = of_rows()
        else:
            first, second = tf.cond(kappa <= width, of_columns, of_rows)
        new_g, new_a = (second, first) if swap else (first, second)
        minus = tf.reduce_sum(new_a, axis=-1, keepdims=True) < 0
        signs = tf.where(minus, -tf.ones((), g.dtype), tf.ones((), g.dtype))
        return new_g * signs, new_a * signs

    enough = 1 if always else rank
    return cut() if least > enough else tf.cond(kappa > enough, cut, lambda: (g, a))


def effective_rank(g: tf.Tensor, a: tf.Tensor, least: tf.Tensor) -> tf.Tensor:
    """How many of the columns that ``truncate`` gave, (rho, groups, columns, n), must stay so that all others
    together are at most ``least`` of ``||U||_F^2``. Terms of different columns are orthogonal in each sample.
    """
    energy = tf.reduce_sum(tf.reduce_sum(g * g, -1) * tf.reduce_sum(a * a, -1), axis=(0, 1))
    behind = tf.cumsum(energy, reverse=True)  # from each column on
    spare = tf.reduce_sum(tf.cast(behind <= tf.cast(least, behind.dtype), tf.int32))
    return tf.maximum(1, tf.size(energy) - spare)


def samples_last(factor: tf.Tensor) -> tf.Tensor:
    """(rho, groups, r, n) as (groups, n, r, rho)."""
    return tf.transpose(factor, (1, 3, 2, 0))


def samples_first(factor: tf.Tensor) -> tf.Tensor:
    """(groups, n, r, rho) as (rho, groups, r, n)."""
    return tf.transpose(factor, (3, 0, 2, 1))


def pad_columns(factor: tf.Tensor, r: tf.Tensor) -> tf.Tensor:
    """(groups, n, r', rho) with zero columns added up to ``r`` of them for each sample."""
    missing = tf.maximum(r - tf.shape(factor)[2], 0)
    return tf.pad(factor, [[0, 0], [0, 0], [0, missing], [0, 0]])


def flat_columns(factor: tf.Tensor) -> tf.Tensor:
    """(groups, n, r, rho) as (groups, n, r rho)."""
    groups, n = factor.shape[:2]
    return tf.reshape(factor, (groups, n, tf.shape(factor)[2] * tf.shape(factor)[3]))


def gram_implicit(xg: tf.Tensor, xa: tf.Tensor) -> tf.Tensor:
    """``(u_i)^T u_j ~ elesum((Xi_Ai^T Xi_Aj) o (Xi_Gi^T Xi_Gj))`` (SENG eq. 21), summed over groups.

    Args:
        xg: (groups, zeta_G, r, rho), xa: (groups, zeta_A, r, rho).

    Returns:
        (rho, rho).
    """
    r, rho = tf.shape(xg)[2], tf.shape(xg)[3]
    g, a = flat_columns(xg), flat_columns(xa)
    products = tf.matmul(g, g, transpose_a=True) * tf.matmul(a, a, transpose_a=True)
    return tf.reduce_sum(tf.reshape(products, (xg.shape[0], r, rho, r, rho)), axis=(0, 1, 3))


def project_implicit(xg: tf.Tensor, xa: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
    """``u_i^T z ~ elesum((Xi_z^T Xi_Gi) o Xi_Ai)`` (SENG eq. 19), summed over groups: (rho,).

    Args:
        xg: (groups, zeta_G, r, rho), xa: (groups, zeta_A, r, rho), z: (groups, zeta_A, zeta_G),
            with the weights of Omega_G and Omega_A in all three.
    """
    r, rho = tf.shape(xg)[2], tf.shape(xg)[3]
    total = tf.reduce_sum(tf.matmul(z, flat_columns(xg)) * flat_columns(xa), axis=(0, 1))
    return tf.reduce_sum(tf.reshape(total, (r, rho)), axis=0)


def gram_table(rows: tf.Tensor, g: tf.Tensor) -> tf.Tensor:
    """``(u_i)^T u_j`` of samples that have few rows of a table: (rho, rho).

    One sample after the other, each as its rows among those that any sample uses: no more than
    (rows used, n_G) numbers at a time.

    Args:
        rows: (rho, kappa) int64, g: (rho, kappa, n_G).
    """
    unique, places = tf.unique(tf.reshape(rows, [-1]))
    places, used = tf.reshape(places, tf.shape(rows)), tf.maximum(tf.size(unique), 1)

    def against_all(one: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        table = tf.math.unsorted_segment_sum(one[1], one[0], used)
        return project_table(places, g, table)

    # A sample more, of zeros: TensorFlow stacks no list that is empty.
    padded = [tf.pad(part, [[0, 1], *[[0, 0]] * (len(part.shape) - 1)]) for part in (places, g)]
    gram = tf.map_fn(against_all, tuple(padded), fn_output_signature=tf.TensorSpec([None], g.dtype))
    return gram[:-1]


def project_table(rows: tf.Tensor, g: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
    """``u_i^T z`` of samples that have few rows of a table z (V, n_G): (rho,).

    Args:
        rows: (rho, kappa) integers, g: (rho, kappa, n_G).
    """
    return tf.reduce_sum(tf.gather(z, rows) * g, axis=(1, 2))


def expand_table(rows: tf.Tensor, g: tf.Tensor, c: tf.Tensor, height: int) -> tf.Tensor:
    """``U c`` for a table of ``height`` rows, flat.

    Args:
        rows: (rho, kappa) integers, g: (rho, kappa, n_G), c: (rho,).
    """
    weighted = tf.reshape(g * c[:, None, None], (-1, tf.shape(g)[2]))
    return tf.reshape(tf.math.unsorted_segment_sum(weighted, tf.reshape(rows, [-1]), height), [-1])


def factored_means(g: tf.Tensor, a: tf.Tensor, c: tf.Tensor,
                   total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """``sum_i sqrt|c_i| G_i`` and ``sum_i c_i/total A_i`` (SENG eq. 23), zero where total is zero.

    Args:
        g: (groups, n_G, r, rho), a: (groups, n_A, r, rho), c: (rho,),
            total: ``sum_i sqrt|c_i|``, 0-D.

    Returns:
        (groups, n_G, r) and (groups, n_A, r).
    """
    weights = tf.where(total > 0, c / total, tf.zeros_like(c))
    return _over_samples(g, tf.sqrt(tf.abs(c))), _over_samples(a, weights)


def _over_samples(factor: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    shape = tf.shape(factor)
    flat = tf.reshape(factor, (shape[0] * shape[1] * shape[2], shape[3]))
    mean = tf.reshape(tf.linalg.matvec(flat, weights), shape[:3])
    return tf.ensure_shape(mean, factor.shape[:3])


def expand_exact(g: tf.Tensor, a: tf.Tensor, c: tf.Tensor) -> tf.Tensor:
    """``U c`` of SENG eq. 22 as one product: (groups, n_A, n_G)."""
    return tf.matmul(flat_columns(a), flat_columns(g * c), transpose_b=True)


def matrix_of(flat: tf.Tensor, groups: int, n_g: int) -> tf.Tensor:
    """Rows of a kernel's gradient, flat in Keras' order (n_A, groups, n_G), as (groups, n_A, n_G)."""
    if groups == 1:
        return tf.reshape(flat, (1, -1, n_g))
    return tf.transpose(tf.reshape(flat, (-1, groups, n_g)), (1, 0, 2))


def flat_of(matrix: tf.Tensor) -> tf.Tensor:
    """The inverse of :func:`matrix_of`."""
    groups = matrix.shape[0]
    return tf.reshape(matrix if groups == 1 else tf.transpose(matrix, (1, 0, 2)), [-1])

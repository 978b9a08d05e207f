"""Which rows are sampled, at which weight, so that E[Omega^T Omega] = I (SENG eq. 14, A.1-A.2)."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]


def seeded_generator(seed: int, step: int, label: str) -> np.random.Generator:
    """The random numbers of one choice: the same for the same (seed, step, label) everywhere."""
    return np.random.default_rng([seed, step, zlib.crc32(label.encode())])


def sample_rows(n: int, q: int, rng: np.random.Generator, *, scores: npt.NDArray[Any] | None = None,
                replacement: bool = False) -> tuple[Rows, Reals]:
    """q of n rows and their weights: row k of Omega is ``weights[k] * e_rows[k]^T``.

    With replacement each draw takes row j with probability p_j, weight ``1/sqrt(q p_j)``. Without,
    row j is in the sample with probability ``pi_j = min(1, c p_j)``, c such that q are expected
    (systematic sampling in random order, always exactly q rows), weight ``1/sqrt(pi_j)``; for
    uniform sampling that is ``sqrt(n/q)``. Both give ``E[Omega^T Omega] = I``; SENG eq. 14 prints
    ``1/p_j``, which does not.

    Args:
        scores: non-negative and finite, ``p_j`` is proportional to them; None for uniform. Rows of
            score zero are never drawn (their row of U is zero, so nothing is lost). When fewer
            than q rows have a score, sampling without replacement takes those and pads with
            others at weight zero.

    Returns:
        rows (q,) sorted, weights (q,).

    Raises:
        ValueError: q is larger than n, or the scores are not finite or negative.
    """
    if not 1 <= q <= n:
        raise ValueError(f"sketch size must be in [1, n] = [1, {n}], got {q}; sample fewer rows, "
                         "or do not sketch this layer")
    if scores is None:
        if replacement:
            rows = np.sort(rng.integers(0, n, size=q))
        else:
            rows = np.sort(rng.choice(n, size=q, replace=False, shuffle=False))
        return rows.astype(np.int64), np.full(q, np.sqrt(n / q))
    scores = np.asarray(scores, dtype=np.float64)
    total = scores.sum()
    if not np.isfinite(total) or (scores < 0).any():
        raise ValueError("row scores must be finite and not negative; take the curvature of "
                         "another batch")
    if total == 0.0:
        return sample_rows(n, q, rng, replacement=replacement)
    if replacement:
        cumulative = np.cumsum(scores)
        draws = np.sort(rng.random(q)) * cumulative[-1]
        rows = np.searchsorted(cumulative, draws, side="right")
        rows = np.minimum(rows, np.flatnonzero(scores)[-1])
        return rows.astype(np.int64), np.sqrt(total / (q * scores[rows]))
    return _draw_systematic(inclusion_probabilities(scores, q), q, rng)


def usable_scores(scores: npt.NDArray[Any]) -> Reals | None:
    """The scores when all are finite, else None: rows are then chosen uniformly.

    Squares of finite numbers may overflow, on one rank only. Its small system then has no factor,
    and all ranks refuse the layer's curvature together.
    """
    scores = np.asarray(scores, dtype=np.float64)
    return scores if np.isfinite(scores.sum()) else None


def inclusion_probabilities(scores: Reals, q: int) -> Reals:
    """``pi_j = min(1, c scores_j)`` that sum to q; 1 for all when q or fewer have a score."""
    positive = scores > 0
    if positive.sum() <= q:
        return positive.astype(np.float64)
    certain = np.zeros(scores.shape, dtype=bool)
    while True:
        left = scores * ~certain
        chances = left * ((q - certain.sum()) / left.sum())
        over = chances >= 1.0
        if not over.any():
            return np.where(certain, 1.0, chances)
        certain |= over


def _draw_systematic(chances: Reals, q: int, rng: np.random.Generator) -> tuple[Rows, Reals]:
    certain = np.flatnonzero(chances >= 1.0)
    others = rng.permutation(np.flatnonzero((chances > 0.0) & (chances < 1.0)))
    wanted = q - certain.size
    drawn = others[:0]
    if others.size and wanted > 0:
        cumulative = np.cumsum(chances[others])
        marks = (rng.random() + np.arange(wanted)) * (cumulative[-1] / wanted)
        places = np.searchsorted(cumulative, marks, side="right")
        drawn = others[np.minimum(places, others.size - 1)]
    rows = np.concatenate([certain, drawn])
    weights = 1.0 / np.sqrt(chances[rows])
    if rows.size < q:
        spare = np.setdiff1d(np.arange(chances.size), rows)[: q - rows.size]
        rows = np.concatenate([rows, spare])
        weights = np.concatenate([weights, np.zeros(spare.size)])
    order = np.argsort(rows, kind="stable")
    return rows[order].astype(np.int64), weights[order]


def sample_batch(rho: int, subsample: int | None, rng: np.random.Generator) -> Rows | None:
    """The samples of a batch that the curvature is taken from, sorted; None for all of them."""
    if subsample is None or subsample >= rho:
        return None
    return np.sort(rng.choice(rho, size=subsample, replace=False, shuffle=False)).astype(np.int64)

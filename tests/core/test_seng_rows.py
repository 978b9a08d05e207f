"""Row sampling: E[Omega^T Omega] = I, and the error bounds of assumptions A.1 and A.2."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_ext.seng.row_sampling import (
    inclusion_probabilities,
    sample_batch,
    sample_rows,
    seeded_generator,
    usable_scores,
)

KINDS = [(leverage, replacement) for leverage in (False, True) for replacement in (False, True)]


def matrix(n: int = 60, rho: int = 4) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.standard_normal((n, rho)) + rng.uniform(0.5, 3.0, size=(n, 1))


@pytest.mark.parametrize(("leverage", "replacement"), KINDS)
def test_rows_are_sorted_and_the_same_for_the_same_seed(leverage, replacement):
    scores = np.square(matrix()).sum(1) if leverage else None
    draws = [sample_rows(60, 20, seeded_generator(5, 200, "layer"), scores=scores, replacement=replacement)
             for _ in range(2)]
    rows, weights = draws[0]
    assert rows.shape == weights.shape == (20,)
    assert (np.diff(rows) >= 0).all()
    if not replacement:
        assert (np.diff(rows) > 0).all()
    if not leverage:
        np.testing.assert_allclose(weights, np.sqrt(60 / 20))
    np.testing.assert_array_equal(rows, draws[1][0])
    other, _ = sample_rows(60, 20, seeded_generator(5, 201, "layer"), scores=scores,
                           replacement=replacement)
    assert not np.array_equal(rows, other)


@pytest.mark.parametrize(("leverage", "replacement"), KINDS)
def test_sketch_is_unbiased(leverage, replacement):
    """E[Omega^T Omega] = I on each diagonal entry (off it Omega^T Omega is zero): a z-test over
    1,000 seeds. With 60 entries at |z| < 5 a right sampler fails in fewer than one run in 20,000;
    the seeds are fixed, so it either always passes or never."""
    scores = np.square(matrix()).sum(1) if leverage else None
    count = 1000
    diagonals = np.zeros((count, 60))
    for seed in range(count):
        rows, weights = sample_rows(60, 20, seeded_generator(seed, 0, "x"), scores=scores,
                                    replacement=replacement)
        np.add.at(diagonals[seed], rows, weights**2)
    error = diagonals.std(0) / np.sqrt(count)
    sure = error < 1e-12
    np.testing.assert_allclose(diagonals[:, sure], 1.0)
    z = (diagonals.mean(0)[~sure] - 1.0) / error[~sure]
    assert np.abs(z).max() < 5.0


@pytest.mark.parametrize(("leverage", "replacement"), KINDS)
def test_subspace_embedding_and_matrix_product(leverage, replacement):
    """A.1 ``‖N^T O^T O N - I‖ <= eta`` and A.2 ``‖N^T O^T O v - N^T v‖^2 <= eps ‖v‖^2`` hold with
    probability at least 1 - delta for the q that matrix Chernoff and Markov bounds give.

    For rows sampled at probability p_j with coherence ``mu = max_j ‖N_j‖^2/(p_j)``:
    ``q >= 8/3 mu log(2 rho/delta)/eta^2`` suffices for A.1, ``q >= mu/(eps delta)`` for A.2. With
    delta = 0.1 and 300 seeds, more than 45 violations of either would have a chance below 0.2 %.
    """
    n, rho, eta, delta, eps = 3000, 3, 0.5, 0.1, 0.5
    rng = np.random.default_rng(2)
    u = rng.standard_normal((n, rho))
    v = rng.standard_normal(n)
    basis, _ = np.linalg.qr(u)
    scores = np.square(u).sum(1) if leverage else None
    p = np.full(n, 1 / n) if scores is None else scores / scores.sum()
    mu = (np.square(basis).sum(1) / p).max()
    q = int(np.ceil(max(8 / 3 * mu * np.log(2 * rho / delta) / eta**2, mu / (eps * delta))))
    assert q < n / 2
    broken = np.zeros(2, int)
    for seed in range(300):
        rows, weights = sample_rows(n, q, seeded_generator(seed, 0, "y"), scores=scores,
                                    replacement=replacement)
        xi = basis[rows] * weights[:, None]
        broken[0] += np.linalg.norm(xi.T @ xi - np.eye(rho), 2) > eta
        error = xi.T @ (v[rows] * weights) - basis.T @ v
        broken[1] += error @ error > eps * (v @ v)
    assert (broken <= 45).all()


def test_errors_shrink_with_the_sketch():
    u = matrix(2000, 3)
    basis, _ = np.linalg.qr(u)
    errors = []
    for q in (100, 400, 1600):
        found = []
        for seed in range(40):
            rows, weights = sample_rows(2000, q, seeded_generator(seed, 0, "z"),
                                        scores=np.square(u).sum(1), replacement=True)
            xi = basis[rows] * weights[:, None]
            found.append(np.linalg.norm(xi.T @ xi - np.eye(3), 2))
        errors.append(np.mean(found))
    # Like 1/sqrt(q): each fourfold sketch halves the error.
    assert 1.6 < errors[0] / errors[1] < 2.5
    assert 1.6 < errors[1] / errors[2] < 2.5


def test_inclusion_probabilities_are_capped_and_sum_to_q():
    scores = np.array([100.0, 1, 1, 1, 1, 0])
    chances = inclusion_probabilities(scores, 3)
    np.testing.assert_allclose(chances, [1, 0.5, 0.5, 0.5, 0.5, 0])
    rows, weights = sample_rows(6, 3, seeded_generator(0, 0, "a"), scores=scores)
    assert 0 in rows
    assert weights[list(rows).index(0)] == 1.0


def test_few_scores_are_taken_all_and_padded_at_weight_zero():
    scores = np.array([0.0, 2.0, 0.0, 1.0, 0.0])
    rows, weights = sample_rows(5, 4, seeded_generator(0, 0, "a"), scores=scores)
    assert rows.size == 4
    taken = dict(zip(rows.tolist(), weights.tolist(), strict=True))
    assert (taken[1], taken[3]) == (1.0, 1.0)
    assert sum(taken.values()) == 2.0


@pytest.mark.parametrize("q", [0, 11])
def test_a_sketch_larger_than_n_is_refused(q):
    with pytest.raises(ValueError, match=r"\[1, 10\], got"):
        sample_rows(10, q, seeded_generator(0, 0, "a"))


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        sample_rows(3, 2, seeded_generator(0, 0, "a"), scores=np.array([1.0, np.nan, 2.0]))


def test_sample_batch():
    assert sample_batch(8, None, seeded_generator(0, 0, "s")) is None
    assert sample_batch(8, 8, seeded_generator(0, 0, "s")) is None
    rows = sample_batch(8, 3, seeded_generator(0, 0, "s"))
    assert rows.size == np.unique(rows).size == 3


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("bad", [np.inf, np.nan, np.float64(1e308)])
def test_scores_that_overflow_on_one_rank_choose_uniformly_there(bad):
    scores = np.ones(20)
    assert usable_scores(scores) is not None
    scores[[3, 4]] = bad  # finite numbers whose sum overflows count too
    assert usable_scores(scores) is None
    rows, weights = sample_rows(20, 5, seeded_generator(0, 0, "layer"), scores=usable_scores(scores))
    assert len(rows) == 5
    assert np.isfinite(weights).all()

"""The compiled recursion against the oracle."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

from hvd_ext.reducers.delay_compensation import DelayCompensated  # noqa: E402
from hvd_ext.tensorflow.reducers.kernels.delay_compensation import MAX_FUSED, reduced_slice  # noqa: E402
from tests.reference.delay_compensation import DelayOracle  # noqa: E402

LR = 0.4


def reduced(rows, config, mean_square, *, good=True, scale=1.0, order=None, dtype="float32"):
    """What the kernel makes of rows, as arrays."""
    workers = len(rows)
    order = tf.constant(range(workers) if order is None else order, tf.int32)
    total, after = reduced_slice(
        tf.constant(np.stack(rows), dtype), order, tf.constant(good), tf.constant(LR / workers),
        None if mean_square is None else tf.constant(mean_square, dtype), config, scale, workers)
    return total.numpy(), None if after is None else after.numpy()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("displacement", ["cumulative", "local"])
@pytest.mark.parametrize("workers", [2, 5, MAX_FUSED, MAX_FUSED + 1, 3 * MAX_FUSED])
def test_recursion_is_the_oracles(workers, displacement, adaptive, dtype):
    rng = np.random.default_rng(workers)
    rows = [rng.standard_normal(301) for _ in range(workers)]
    oracle = DelayOracle(lam=1.3, adaptive=adaptive, decay=0.9, order="rank",
                         displacement=displacement)
    config = DelayCompensated(1.3, adaptive=adaptive, decay=0.9, displacement=displacement)
    mean_square = np.zeros(301) if adaptive else None
    close = {"rtol": 2e-5, "atol": 2e-6} if dtype == "float32" else {"rtol": 1e-6, "atol": 1e-8}
    order = rng.permutation(workers)
    for _ in range(2):
        shuffled = [rows[place] for place in np.argsort(order)]
        total, mean_square = reduced(shuffled, config, mean_square, order=order, dtype=dtype)
        np.testing.assert_allclose(total, oracle.reduce(rows, LR), **close)
        if adaptive:
            np.testing.assert_allclose(mean_square, oracle.mean_square, rtol=1e-5)
        rows = [row * 0.5 for row in rows]


@pytest.mark.parametrize("workers", [3, MAX_FUSED + 3])
def test_bad_step_is_the_plain_mean_and_leaves_mean_square(workers):
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal(50) for _ in range(workers)]
    rows[1][7], rows[2][9] = np.nan, np.inf
    before = rng.random(50).astype("float32")
    total, after = reduced(rows, DelayCompensated(), before, good=False)
    np.testing.assert_allclose(total, np.mean(rows, axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after, before)


def test_scale_is_undone():
    """Rows that are divided by the number of micro-batches give the sum of what they were."""
    rng = np.random.default_rng(1)
    rows = [rng.standard_normal(50) for _ in range(4)]
    plain, square = reduced(rows, DelayCompensated(), np.zeros(50))
    scaled, square_scaled = reduced([row / 4 for row in rows], DelayCompensated(), np.zeros(50),
                                    scale=4.0)
    np.testing.assert_allclose(4 * scaled, plain, rtol=1e-5)
    np.testing.assert_allclose(square_scaled, square, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_summed_in_float32(dtype):
    rows = [np.full(8, 1.0), *[np.full(8, 2.0**-10)] * 1024]
    total, _ = reduced(rows, DelayCompensated(0.0, adaptive=False), None, dtype=dtype)
    assert total.dtype == np.float32
    np.testing.assert_allclose(total * len(rows), 2.0, rtol=1e-6)  # in half precision they are lost

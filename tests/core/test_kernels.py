"""Compiled kernels against what they stand for, bit for bit where that is promised, and against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_ext import kernels
from hvd_ext.kernels.threads import MIN_THREAD_NUMEL, run_in_parts
from hvd_ext.reducers.delay_compensation import update_rules
from hvd_ext.reducers.delay_compensation.update_rules import AsyncRule, apply_in_blocks
from tests.reference.delay_compensation import DelayOracle
from tests.reference.spars_ams import amsgrad_step

numba = pytest.importorskip("numba", reason="needs Numba: pip install '.[fast]'")

from hvd_ext.kernels import amsgrad, compiler, recursion, topk  # noqa: E402

DTYPES = st.sampled_from([np.float32, np.float64])
SIZES = st.one_of(st.integers(0, 70), st.sampled_from([2047, 2048, 2049, 6000]))


def test_kernels_are_used_here_and_can_be_turned_off(monkeypatch):
    assert kernels.kernels_usable()
    monkeypatch.setenv(kernels.VARIABLE, "plain")
    assert not kernels.kernels_usable()
    monkeypatch.setenv(kernels.VARIABLE, "fast")
    with pytest.raises(ValueError, match="HVD_EXT_KERNELS must be one of auto, plain, triton, got 'fast'"):
        kernels.kernels_usable()


def test_without_numba_the_plain_way_is_taken():
    code = ("import sys; sys.modules['numba'] = None\n"
            "from hvd_ext import kernels; from hvd_ext.kernels import amsgrad, recursion, rules, topk\n"
            "assert not kernels.kernels_usable()\n")
    environment = {key: value for key, value in os.environ.items() if key != kernels.VARIABLE}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def strange(rng, size, dtype):
    """Normal numbers with zeros, infinities, NaN, and ones at the ends of the range among them."""
    values = rng.standard_normal(size).astype(dtype)
    places = rng.random(size) < 0.2
    kinds = [0.0, -0.0, np.inf, -np.inf, np.nan, np.finfo(dtype).max, np.finfo(dtype).tiny / 4]
    values[places] = rng.choice(np.array(kinds, dtype), int(places.sum()))
    return values


def updated(rule, arrays, velocity, monkeypatch, way):
    w, gradient, bak, square = (one.copy() for one in arrays)
    moved = None if velocity is None else velocity.copy()
    monkeypatch.setenv(kernels.VARIABLE, way)
    with np.errstate(all="ignore"):
        apply_in_blocks(rule, w, gradient, lr=0.1, momentum=0.7, w_bak=bak,
                        mean_square=square if rule.adaptive else None, velocity=moved,
                        work=(np.empty(update_rules.BLOCK_NUMEL, w.dtype),
                              np.empty(update_rules.BLOCK_NUMEL, w.dtype)))
    return [w, bak, square, *([] if moved is None else [moved])]


@settings(deadline=None)
@given(size=SIZES, dtype=DTYPES, moving=st.booleans(), seed=st.integers(0, 99),
       rule=st.sampled_from([AsyncRule(name="asgd"), AsyncRule(name="dc-asgd-c"), AsyncRule(),
                             AsyncRule(decay=0.0, lam=0.3, eps=1e-3)]))
def test_the_servers_update_is_numpys_bit_for_bit(size, dtype, moving, seed, rule):
    rng = np.random.default_rng(seed)
    arrays = [strange(rng, size, dtype) for _ in range(3)] + [np.abs(strange(rng, size, dtype))]
    velocity = strange(rng, size, dtype) if moving else None
    with pytest.MonkeyPatch.context() as patch:
        plain = updated(rule, arrays, velocity, patch, "plain")
        compiled = updated(rule, arrays, velocity, patch, "auto")
    for one, other in zip(plain, compiled, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_servers_update_goes_through_the_kernel(monkeypatch):
    """Otherwise the comparison above would compare NumPy with itself."""
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    monkeypatch.setattr("hvd_ext.kernels.rules.update_weights", lambda *args, **kwargs: args[0].fill(7.0))
    arrays = [np.zeros(5, np.float32) for _ in range(4)]
    assert (updated(AsyncRule(), arrays, None, monkeypatch, "auto")[0] == 7.0).all()
    strided = [np.zeros(10, np.float32)[::2] for _ in range(4)]
    assert (updated(AsyncRule(), strided, None, monkeypatch, "auto")[0] == 7.0).all()  # copies are contiguous
    w = np.zeros(10, np.float32)[::2]
    apply_in_blocks(AsyncRule(name="asgd"), w, np.ones(5, np.float32), lr=0.5, momentum=0.0,
                    w_bak=np.zeros(5, np.float32), mean_square=None, velocity=None,
                    work=(np.empty(5, np.float32), np.empty(5, np.float32)))
    assert (w == -0.5).all()


def compensated(rows, square, *, cumulative, lam, decay, eps, step, out=None):
    out = np.full(rows[0].size, np.nan, rows[0].dtype) if out is None else out
    scalar = out.dtype.type
    recursion.compensated_sum(
        compiler.row_addresses(rows), out if square is None else square, out, 0, out.size,
        adaptive=square is not None, cumulative=cumulative, decay=scalar(decay), fresh=scalar(1 - decay),
        eps=scalar(eps), strength=scalar(-step * lam), divisor=scalar(len(rows)))
    return out


@settings(deadline=None)
@given(size=SIZES, dtype=DTYPES, workers=st.integers(2, 6), adaptive=st.booleans(), cumulative=st.booleans(),
       seed=st.integers(0, 99))
def test_recursion_is_the_oracles(size, dtype, workers, adaptive, cumulative, seed):
    rng = np.random.default_rng(seed)
    oracle = DelayOracle(lam=1.3, adaptive=adaptive, decay=0.9, order="rank",
                         displacement="cumulative" if cumulative else "local")
    square = np.zeros(size, dtype) if adaptive else None
    for _ in range(2):
        rows = [rng.standard_normal(size).astype(dtype) for _ in range(workers)]
        found = compensated(rows, square, cumulative=cumulative, lam=1.3, decay=0.9, eps=1e-7,
                            step=0.4 / workers)
        tolerance = 2e-5 if dtype == np.float32 else 1e-12
        np.testing.assert_allclose(found, oracle.reduce(rows, 0.4), rtol=tolerance, atol=tolerance / 10)
    if adaptive:
        np.testing.assert_allclose(square, oracle.mean_square + np.zeros(size), rtol=1e-5)


def test_the_result_may_take_the_place_of_a_row():
    rng = np.random.default_rng(1)
    rows = [rng.standard_normal(5000) for _ in range(3)]
    rule = {"cumulative": True, "lam": 2.0, "decay": 0.9, "eps": 1e-7, "step": 0.1}
    expected = compensated(rows, np.zeros(5000), **rule)
    for place in range(3):
        given_rows = [row.copy() for row in rows]
        compensated(given_rows, np.zeros(5000), out=given_rows[place], **rule)
        np.testing.assert_array_equal(given_rows[place], expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_amsgrad_is_the_oracles(threads):
    rng = np.random.default_rng(0)
    size = 3 * MIN_THREAD_NUMEL + 5
    w = rng.standard_normal(size)
    expected = w.copy()
    states = [np.zeros(size) for _ in range(3)]
    oracle = {name: np.zeros(size) for name in ("m", "v", "vhat")}
    values = {"lr": -0.1, "beta1": 0.9, "fresh1": 1 - 0.9, "beta2": 0.99, "fresh2": 1 - 0.99, "eps": 1e-6,
              "shrink": 1.0, "decay": 0.0, "sign": 1.0}
    for _ in range(3):
        gradient = rng.standard_normal(size)
        run_in_parts(lambda start, stop,
                     g=gradient: amsgrad.update_amsgrad(w, g, *states, start, stop, **values), size,
                     threads)
        expected = amsgrad_step(expected, gradient, oracle, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-6)
        np.testing.assert_allclose(w, expected, rtol=1e-12, atol=1e-13)


@settings(deadline=None)
@given(size=SIZES, dtype=DTYPES, seed=st.integers(0, 99), expected=st.integers(0, 6000),
       threshold=st.sampled_from([0.0, 0.1, 1.0, 2.5, 9.0]))
def test_entries_above_a_threshold_are_all_found(size, dtype, seed, expected, threshold):
    flat = strange(np.random.default_rng(seed), size, dtype)
    magnitudes = np.abs(flat)
    threshold = float(dtype(threshold))
    with np.errstate(invalid="ignore"):
        positions = np.flatnonzero(magnitudes >= threshold if threshold else magnitudes > 0)
    found, larger = topk.find_above(flat, threshold, expected)
    np.testing.assert_array_equal(found, positions)
    np.testing.assert_array_equal(larger, magnitudes[positions])


@pytest.mark.parametrize("length",
                         [0, 1, MIN_THREAD_NUMEL - 1, 2 * MIN_THREAD_NUMEL, 5 * MIN_THREAD_NUMEL + 7])
def test_threads_cover_everything_once(length):
    visits = np.zeros(length, int)

    def visit(start, stop):
        visits[start:stop] += 1

    run_in_parts(visit, length, 4)
    assert (visits == 1).all()


def test_an_error_in_a_thread_is_raised():
    def fails_at_the_end(start, stop):
        if stop == 4 * MIN_THREAD_NUMEL:
            raise ArithmeticError("here")

    with pytest.raises(ArithmeticError, match="here"):
        run_in_parts(fails_at_the_end, 4 * MIN_THREAD_NUMEL, 4)

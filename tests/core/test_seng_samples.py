"""Where a layer's samples are: decided in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_ext.seng import Settings
from hvd_ext.seng.coverage_report import UncoveredParameters, coverage_line, format_names, group_by_reason
from hvd_ext.seng.sample_axes import (
    CONSTANT,
    CONTIGUOUS,
    ROWS,
    STRIDED,
    Signature,
    chosen_for,
    common_placement,
    describe_samples,
    is_plain,
    recognize_placement,
    rows_of,
    shuffled_order,
)

B = 6


def signature(x: np.ndarray) -> Signature:
    axes = {a: np.moveaxis(x, a, 0).reshape(x.shape[a], -1) @ np.random.default_rng(1).standard_normal(
        x.size // x.shape[a]) for a in range(x.ndim) if a == 0 or x.shape[a] == B}
    return Signature(axes, 1e-9 * float(np.abs(x).max() + 1))


def windows(x: np.ndarray) -> np.ndarray:
    """(B, T, d) as windows of two rows after a roll: (B T/2, 2, d)."""
    return np.roll(x, 1, axis=1).reshape(-1, 2, x.shape[-1])


LAYOUTS = {
    "first": (lambda x: x, 0),
    "time first": (lambda x: x.swapaxes(0, 1), 1),
    "flattened": (lambda x: x.reshape(-1, x.shape[-1]), CONTIGUOUS),
    "time-major, flattened": (lambda x: x.swapaxes(0, 1).reshape(-1, x.shape[-1]), STRIDED),
    "windows": (windows, CONTIGUOUS),
    "constant": (lambda x: np.arange(12.0).reshape(1, 12), CONSTANT),
    "constant, as long as the batch": (lambda x: np.arange(6.0).reshape(6, 1), CONSTANT),
    "rows sent to an expert": (lambda x: x[x[..., 0] > 0], ROWS),
    "all alike": (lambda x: np.ones_like(x), 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("time", [4, B])
def test_recognise(layout, time):
    x = np.random.default_rng(0).standard_normal((B, time, 3))
    arrange, wanted = LAYOUTS[layout]
    found = recognize_placement(signature(arrange(x)), signature(arrange(x[shuffled_order(B)])), B)
    assert found == wanted


def test_the_axis_that_was_asked_for_comes_first():
    x = np.ones((B, B))
    assert recognize_placement(signature(x), signature(x), B) == 0
    assert recognize_placement(signature(x), signature(x), B, first=1) == 1


@pytest.mark.parametrize("batch", [2, 3, 17])
def test_no_sample_stays_at_its_place(batch):
    order = shuffled_order(batch)
    assert sorted(order) == list(range(batch))
    assert (order != np.arange(batch)).all()


def test_rows_of_samples():
    assert rows_of(0, 6, 6) is None
    assert rows_of(ROWS, 7, 3) is None
    np.testing.assert_array_equal(rows_of(CONTIGUOUS, 6, 3), [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(rows_of(STRIDED, 6, 3), [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(rows_of(CONTIGUOUS, 3, 1), [[0, 1, 2]])
    index = rows_of(lambda rows: np.array([1, 0, 1, 3]), 4, None)
    np.testing.assert_array_equal(index, [[1, -1], [0, 2], [-1, -1], [3, -1]])
    for bad, said in [((CONTIGUOUS, 7, 3), "no multiple"), ((STRIDED, 6, None), "not known"),
                      ((lambda rows: np.zeros(2, int), 4, None), "4 sample numbers"),
                      ((lambda rows: np.zeros(4), 4, None), "sample numbers")]:
        with pytest.raises(ValueError, match=said):
            rows_of(*bad)


def test_what_is_beyond_doubt_and_what_uses_have_in_common():
    assert is_plain((6, 3), 6)
    assert not is_plain((6, 6), 6)
    assert not is_plain((12, 3), 6)
    assert is_plain((3, 6), 6, axis=1)
    assert common_placement([1, 1]) == 1
    assert common_placement([1, CONTIGUOUS]) == ROWS


def test_settings_name_modules_and_whatever_is_in_them():
    samples = {"body": 1, "body.head": CONTIGUOUS}
    assert chosen_for("body.norm", samples) == 1
    assert chosen_for("body.head.fc", samples) == CONTIGUOUS
    assert chosen_for("bodyguard", samples) is None
    assert describe_samples({"a": len}) == {"a": "<function>"}


@pytest.mark.parametrize(("bad", "said"), [
    ({"samples": -1}, "samples must be at least 0"),
    ({"samples": "first"}, "samples must be a whole number"),
    ({"samples": {1: 0}}, "names of modules"),
    ({"samples": {"a": "windows"}}, "'contiguous', 'strided', 'rows'; got 'windows'"),
    ({"samples": {"a": -2}}, r"samples\['a'\] must be at least 0"),
    ({"strict": 1}, "strict must be True or False"),
    ({"check_gradients": None}, "check_gradients must be True or False"),
    ({"fallback": "same"}, "'identity', 'matched', 'none'; got 'same'"),
])
def test_bad_settings_say_value_limit_and_way_out(bad, said):
    with pytest.raises((ValueError, TypeError), match=said):
        Settings(damping=1.0, **bad)


def test_parameters_without_curvature():
    for other, divisor in (("identity", 1.5), ("matched", 0.5), ("none", 1.0)):
        assert Settings(damping=0.5, fallback=other).fallback_divisor(0.5) == divisor


def test_coverage_leads_with_what_has_most_parameters():
    gaps = [UncoveredParameters("a", "K", "no rule", 10),
            UncoveredParameters("b", "K", "it is off (relative error 3e-2)", 20),
            UncoveredParameters("c", "K", "it is off (relative error 4e-2)", 30),
            UncoveredParameters("d", "K", "rank 3 refused it", 1)]
    assert list(group_by_reason(gaps)) == ["it is off", "no rule", "rank N refused it"]
    assert coverage_line(100, gaps, "g") == (
        "SENG has a rule for 39.0 % of 100 parameters; the rest gets g: 50.0 % it is off (b, K, c, K), "
        "10.0 % no rule (a, K), 1.0 % rank N refused it (d, K).")
    assert coverage_line(100, [], "g") == "SENG has a rule for 100 % of 100 parameters."
    assert coverage_line(10**6, gaps[:1], "g").startswith("SENG has a rule for 99.9 %")
    assert format_names(list("abcdef")) == "a, b, c, d and 2 more"


def test_an_input_without_rows_tells_nothing():
    none = Signature({0: np.zeros(0), 1: np.zeros(B)}, 0.0)
    assert recognize_placement(none, none, B) == ROWS
    assert recognize_placement(signature(np.ones((B, 2))), none, B) == ROWS

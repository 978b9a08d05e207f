"""The bound on rounding that tests of float arithmetic compare with."""

import numpy as np
import pytest

from tests.tolerances import UNITS, rounding_tolerance


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_no_order_of_a_sum_leaves_the_bound_although_the_sum_cancels(dtype):
    rng = np.random.default_rng(0)
    for terms in (2, 10, 100):
        x = rng.standard_normal(terms).astype(dtype)
        x[-1] = -x[:-1].sum()
        sums = [np.add.accumulate(x[rng.permutation(terms)], dtype=dtype)[-1] for _ in range(50)]
        apart = float(max(sums)) - float(min(sums))
        tolerance = rounding_tolerance(dtype, terms - 1, np.abs(x.astype("float64")).sum())
        assert apart <= tolerance
        assert terms == 2 or apart > 0
        # A term that is missing or counted twice is far more, but for half precision.
        assert dtype == "float16" or tolerance < np.abs(x).min()


@pytest.mark.parametrize("dtype", [np.float32, np.dtype("float32"), "float32"])
def test_a_dtype_may_be_named_or_given(dtype):
    assert rounding_tolerance(dtype, 1) == pytest.approx(2 * UNITS["float32"])


def test_what_bounds_nothing_is_refused():
    with pytest.raises(ValueError, match="300 roundings in float16 bound nothing; compare in a wider dtype"):
        rounding_tolerance("float16", 300)
    with pytest.raises(ValueError, match=r"dtype must be one of float64, .*got 'int32'"):
        rounding_tolerance("int32", 3)

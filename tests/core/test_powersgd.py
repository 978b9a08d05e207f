"""PowerSGD's settings and plan: what is refused, what is compressed, where the factors are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hvd_ext.reducers.buckets import BucketKey, TensorSpec, plan_buckets
from hvd_ext.reducers.powersgd import PowerSGD, factor_sizes, first_q, plan_matrices


@pytest.mark.parametrize(("settings", "kind", "message"), [
    ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    ({"rank": 1.5}, TypeError, "rank must be a whole number"),
    ({"warm_start": 1}, TypeError, "warm_start must be True or False"),
    ({"min_compression": 0.5}, ValueError, "min_compression must be in"),
    ({"bucket_bytes": 0}, ValueError, "bucket_bytes must be at least 1"),
    ({"exclude": "*.bias"}, TypeError, "exclude must be a list"),
    ({"seed": -1}, ValueError, "seed must be at least 0"),
])
def test_bad_settings(settings, kind, message):
    with pytest.raises(kind, match=message):
        PowerSGD(**settings)


def test_what_is_compressed():
    settings = PowerSGD(2, exclude=["head.*"])
    assert settings.should_compress("a", (16, 16))  # (16 + 16) 2 numbers in place of 256
    assert settings.should_compress("a", (8, 8))  # exactly half
    assert not settings.should_compress("a", (8, 7))
    assert not settings.should_compress("b", (1000,))
    assert not settings.should_compress("b", ())
    assert not settings.should_compress("b", (0, 50))
    assert not settings.should_compress("head.weight", (16, 16))
    assert settings.should_compress("conv", (16, 4, 3, 3))
    assert not PowerSGD(2).should_compress("conv", (1, 64, 64), 0)
    assert PowerSGD(2).should_compress("conv", (1, 64, 64), -1)


@pytest.mark.parametrize("axis", [0, -1])
def test_matrices_cover_the_bucket_and_their_factors_do_not_overlap(axis):
    specs = [TensorSpec(f"w{k}", shape, 4, BucketKey("float32"))
             for k, shape in enumerate([(6, 5), (3, 2, 4), (2, 9)])]
    bucket, = plan_buckets(specs)
    found = plan_matrices(bucket, specs, 4, output_axis=axis)
    assert [one.slot for one in found] == list(bucket.slots)
    for one in found:
        shape = specs[one.slot.index].shape
        assert one.n * one.m == one.slot.numel == np.prod(shape)
        assert (one.n if axis == 0 else one.m) == shape[axis]
        assert one.r == min(4, one.n, one.m)
        assert (one.p.numel, one.q.numel) == (one.n * one.r, one.m * one.r)
    for which, total in zip(("p", "q"), factor_sizes(found), strict=True):
        slots = [getattr(one, which) for one in found]
        assert slots[0].offset == 0
        assert all(a.offset + a.numel == b.offset for a, b in itertools.pairwise(slots))
        assert slots[-1].offset + slots[-1].numel == total
    drawn = first_q(found, (0, 1, 2))
    assert drawn.shape == (factor_sizes(found)[1],)
    np.testing.assert_array_equal(drawn, first_q(found, (0, 1, 2)))
    assert not np.array_equal(drawn, first_q(found, (0, 1, 3)))

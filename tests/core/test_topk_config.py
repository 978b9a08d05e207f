"""Settings of TopK: what is refused and how the error helps, what is compressed, how k goes."""

from __future__ import annotations

import pytest

from hvd_ext.reducers.filters import check_names
from hvd_ext.reducers.topk import TopK, keep_count, warm_up


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, float("nan")])
def test_ratio_outside_its_limits(ratio):
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got .*pass ratio=0.01"):
        TopK(ratio)


@pytest.mark.parametrize(("settings", "kind", "said"), [
    ({"ratio": "1 %"}, TypeError, "ratio must be a number"),
    ({"selection": "radix"}, ValueError, "selection must be one of 'exact', 'sampled'"),
    ({"values": "int8"}, ValueError, "values must be one of 'float32'"),
    ({"error_feedback": 1}, TypeError, "error_feedback must be True or False"),
    ({"per_tensor": None}, TypeError, "per_tensor must be True or False"),
    ({"bucket_bytes": 0}, ValueError, "bucket_bytes must be at least 1"),
    ({"min_size": -1}, ValueError, "min_size must be at least 0"),
    ({"tolerance": 1.0}, ValueError, r"tolerance must be in \[0, 1\)"),
    ({"seed": -1}, ValueError, "seed must be at least 0"),
    ({"exclude": "bias"}, TypeError, r"pass exclude=\['bias'\]"),
    ({"exclude": [3]}, TypeError, "exclude must hold names, got 3"),
])
def test_bad_settings_say_what_to_do(settings, kind, said):
    with pytest.raises(kind, match=said):
        TopK(**settings)


def test_buckets_are_as_large_as_horovods(monkeypatch):
    monkeypatch.delenv("HOROVOD_FUSION_THRESHOLD", raising=False)
    assert TopK().bucket_bytes == 128 * 2**20
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "1000000")
    assert TopK().bucket_bytes == 1_000_000
    assert TopK(bucket_bytes=7).bucket_bytes == 7
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "0")
    assert TopK().bucket_bytes == 1
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "64 MB")
    with pytest.raises(ValueError, match="HOROVOD_FUSION_THRESHOLD must be a whole number of bytes"):
        TopK()


def test_settings_after_the_first_are_by_name():
    with pytest.raises(TypeError):
        TopK(0.01, "sampled")


def test_ratio_as_a_function_is_checked_when_used():
    config = TopK(lambda step: 0.5 / (step + 1))
    assert config.ratio_at(4) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"ratio\(7\) must be in \(0, 1\], got 0"):
        TopK(lambda step: 0.0).ratio_at(7)


def test_warm_up_falls_by_a_constant_factor_and_stays():
    ratio = warm_up(0.01, 4, start=0.25)
    seen = [ratio(step) for step in range(6)]
    assert seen[0] == 0.25
    assert seen[4] == seen[5] == pytest.approx(0.01)
    assert seen[1] / seen[0] == pytest.approx(seen[3] / seen[2])
    with pytest.raises(ValueError, match="start"):
        warm_up(0.01, 4, start=2)


def test_k_is_at_least_one_and_at_most_all():
    assert [keep_count(n, 0.01) for n in (0, 1, 49, 151, 1000)] == [0, 1, 1, 2, 10]
    assert keep_count(7, 1.0) == 7


def test_what_goes_whole():
    config = TopK(exclude=["*.bias", "norm?.weight"], min_size=100)
    assert config.should_compress("a.weight", (10, 10)) is True
    assert config.should_compress("a.weight", (9, 11)) is False
    assert config.should_compress("a.bias", (1000,)) is False
    assert config.should_compress("norm1.weight", (1000,)) is False
    by_shape = TopK(exclude=lambda name, shape: len(shape) == 1, min_size=0)
    assert by_shape.should_compress("x", (5000,)) is False
    assert by_shape.should_compress("x", (1, 1)) is True
    assert by_shape.should_compress("x", (0, 3)) is False


def test_exclude_that_fits_nothing_is_refused():
    check_names(["*.bias"], ["a.weight", "a.bias"])
    with pytest.raises(ValueError, match=r"exclude has 'baes', which matches no parameter.*a.weight"):
        check_names(["baes"], ["a.weight", "a.bias"])

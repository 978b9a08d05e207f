"""Sparse allreduce: thresholds that all agree on, ranges that are even, messages of their own lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_ext.reducers.topk import allreduce
from hvd_ext.reducers.topk.wire import Layout, MessageError


def rows_of(parts, k_out):
    """What owners with these magnitudes tell."""
    rows = []
    for part in parts:
        falling = np.sort(np.abs(part))[::-1]
        most = min(allreduce.max_reply(k_out, len(parts), len(part)), int((falling > 0).sum()))
        told = falling[allreduce.reported_ranks(most) - 1] if most else np.zeros(0)
        rows.append(allreduce.encode_report(most, told, [0] * allreduce.COUNT_BINS))
    return np.array(rows)


@pytest.mark.parametrize(("ranks", "numel", "k_out"), [(2, 4000, 40), (4, 100_000, 1000), (16, 200_000, 2000),
                                                       (64, 300_000, 20_000)])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_threshold_lets_about_k_entries_through(ranks, numel, k_out, spread):
    rng = np.random.default_rng(0)
    scales = np.exp(spread * rng.standard_normal(ranks))
    parts = [scale * rng.standard_t(3, numel // ranks) for scale in scales]
    least = allreduce.shared_threshold(rows_of(parts, k_out), k_out)
    found = sum(min(int((np.abs(part) >= least).sum()), allreduce.max_reply(k_out, ranks, len(part)))
                for part in parts)
    assert found == pytest.approx(k_out, rel=0.05)


def test_threshold_is_zero_where_there_are_too_few():
    parts = [np.array([1.0, 0.0, 3.0]), np.zeros(5)]
    assert allreduce.shared_threshold(rows_of(parts, 100), 100) == 0.0
    assert allreduce.shared_threshold(rows_of([np.zeros(4)] * 3, 0), 0) == 0.0


@given(st.integers(1, 9), st.integers(0, 500), st.integers(0, 2**32 - 1))
def test_cut_ranges_are_ranges_and_nearly_even(ranks, numel, seed):
    rng = np.random.default_rng(seed)
    bounds = allreduce.even_bounds(numel, ranks)
    assert bounds[0] == 0
    assert bounds[-1] == numel
    entries = np.sort((numel * rng.beta(0.3, 2.0, 400)).astype(np.int64)) if numel else np.zeros(0, int)
    for _ in range(3):
        edges = allreduce.count_bins(bounds)
        rows = np.zeros((ranks, allreduce.WORDS))
        for rank in range(ranks):
            rows[rank, 1 + allreduce.POINTS:] = [((entries >= a) & (entries < b)).sum()
                                                 for a, b in zip(edges[rank], edges[rank, 1:], strict=False)]
        assert allreduce.received_counts(rows).sum() == len(entries)
        bounds = allreduce.rebalance(bounds, rows)
        assert bounds[0] == 0
        assert bounds[-1] == numel
        assert (np.diff(bounds) >= 0).all()


def test_ranges_follow_entries_and_wait_longer_each_time():
    rng = np.random.default_rng(1)
    entries = (100_000 * rng.beta(0.5, 4.0, 20_000)).astype(np.int64)
    ranges = allreduce.OwnerRanges(allreduce.even_bounds(100_000, 8))
    seen = []
    for _ in range(6):
        edges = allreduce.count_bins(ranges.bounds)
        rows = np.zeros((8, allreduce.WORDS))
        for rank in range(8):
            rows[rank, 1 + allreduce.POINTS:] = np.histogram(
                entries[entries < edges[rank, -1]], np.unique(edges[rank]))[0]
        seen.append(allreduce.measure_imbalance(rows))
        ranges = ranges.next_ranges(rows)
    assert seen[0] > 2.0
    assert max(seen[2:]) < 1.4
    assert ranges.age > 0
    assert ranges.wait > 1


def message(count, values="float32"):
    words = np.zeros(Layout(count, values).words, np.int32)
    words[:2] = count
    return words


@pytest.mark.parametrize("values", ["float16", "float32", "float64"])
def test_messages_are_told_apart(values):
    counts = [3, 0, 8, 1]
    words = np.concatenate([message(count, values) for count in counts])
    found = list(allreduce.message_layouts(words, values, 4, "b"))
    assert [layout.k for _, layout in found] == counts
    for cut in (words[:-2], np.append(words, np.int32(0)), words[:1], np.zeros(0, np.int32)):
        with pytest.raises(MessageError, match="b: "):
            list(allreduce.message_layouts(cut, values, 4, "b"))
    words[1] += 1
    with pytest.raises(MessageError, match="message 0 of 4"):
        list(allreduce.message_layouts(words, values, 4, "b"))

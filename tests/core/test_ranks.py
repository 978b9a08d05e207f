"""The fixture that starts ranks: results by rank, the failing rank's traceback, no hang."""

from __future__ import annotations

import os
import time

import pytest

from tests.ranks import RankFailure, Ranks, own_rank, run_ranks

pytestmark = pytest.mark.ranks


def mean_of_ranks(scale):
    import horovod.torch as hvd
    import torch

    return float(hvd.allreduce(torch.tensor(scale * hvd.rank()), name="mean"))


def fail_on(rank):
    if own_rank() == rank:
        raise ValueError(f"planted on rank {rank}")
    time.sleep(30)


def die_on(rank):
    if own_rank() == rank:
        os._exit(3)
    time.sleep(30)


def sleep(seconds):
    time.sleep(seconds)


def test_results_come_by_rank(ranks):
    assert ranks(2).run(mean_of_ranks, 10.0) == [5.0, 5.0]
    assert ranks(2).run(own_rank) == [0, 1]


def test_gloo_launcher():
    assert run_ranks(mean_of_ranks, 2, 10.0, launcher="gloo") == [5.0, 5.0]


def test_failing_rank_is_named_with_its_traceback():
    with pytest.raises(RankFailure, match=r"(?s)rank 1 raised.*planted on rank 1"):
        run_ranks(fail_on, 2, 1, init=None)


def test_silent_ranks_are_killed_and_show_where_they_stood():
    with Ranks(2, init=None) as ranks:
        ranks.run(own_rank)
        with pytest.raises(RankFailure, match=r"(?s)rank 0 silent.*in sleep"):
            ranks.run(sleep, 60, timeout=3)
        assert not ranks.alive


def test_dead_rank_ends_the_others():
    outcomes = run_ranks(die_on, 2, 1, init=None, check=False)
    assert [outcome.state for outcome in outcomes] == ["died", "died"]

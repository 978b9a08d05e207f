"""When TopK pays off, against counting by hand, and the exchange that "auto" takes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hvd_ext.planning import Cluster, ComputeCosts, Link, Workload, simulate_steps
from hvd_ext.planning.break_even import (
    break_even_gbps,
    break_even_ranks,
    break_even_ratio,
    moment_elements,
    weight_bytes,
)
from hvd_ext.planning.messages import collective_seconds
from hvd_ext.planning.methods import Scenario, plan_dense, plan_topk, topk_sparse
from hvd_ext.reducers.topk import Layout
from hvd_ext.reducers.topk.allreduce import WORDS
from hvd_ext.reducers.topk.exchange_choice import GBPS, LATENCY_US, exchange_seconds, select_exchange

FREE = Link(10.0, latency_us=0.0)


def setup(numel, ranks, ratio, **more):
    return Scenario(Workload.of_size(numel), ranks, ComputeCosts.no_compute(), ratio, **more)


def rank_bytes(way, numel, ranks, ratio, **more):
    return way(setup(numel, ranks, ratio, **more)).rank_bytes(Cluster.one_rank_per_host(ranks, FREE))


def half(setup):
    return plan_dense(setup, half=True)


def test_bytes_of_each_exchange():
    given = (25_000_000, 64, 0.01)
    assert rank_bytes(plan_dense, *given) == 2 * 63 * 25_000_000 * 4 / 64
    assert rank_bytes(half, *given) == rank_bytes(plan_dense, *given) / 2
    assert rank_bytes(plan_topk, *given) == 63 * (8 + 8 * 250_000)
    dense = simulate_steps(plan_dense(setup(*given)), setup(*given).workload,
                           Cluster.one_rank_per_host(64, FREE))
    assert dense.exchange == pytest.approx(rank_bytes(plan_dense, *given) * 8 / 10e9)
    assert rank_bytes(plan_topk, 100_000, 1, 0.01) == 0


def test_two_ranks_move_two_percent_of_dense():
    given = (11_200_000, 2, 0.01)
    assert rank_bytes(plan_topk, *given) / rank_bytes(plan_dense, *given) == pytest.approx(0.02, rel=1e-3)


def test_a_sparse_allreduce_does_not_grow_with_the_ranks():
    few, many = (rank_bytes(topk_sparse, 25_000_000, ranks, 0.001) for ranks in (16, 64))
    entries = 4 * 2 * 25_000
    assert few == pytest.approx(2 * 15 / 16 * entries, rel=0.07)
    assert many == pytest.approx(2 * 63 / 64 * entries, rel=0.14)  # what owners tell grows with the ranks
    gather = rank_bytes(plan_topk, 25_000_000, 64, 0.001)
    assert many < gather / 20


def test_auto_takes_the_quicker_exchange():
    def chosen(ranks, k, exchange="auto"):
        return select_exchange(exchange, ranks, k, "float32")

    assert chosen(1, 10**6, "sparse_allreduce") == "allgather"
    assert chosen(2, 10**6) == "allgather"  # as many bytes, more hops
    assert chosen(16, 10**6) == "sparse_allreduce"
    assert chosen(16, 100) == "allgather"  # hops count
    assert chosen(16, 100, "sparse_allreduce") == "sparse_allreduce"


@pytest.mark.parametrize(("ranks", "k", "values"), [(2, 100, "float32"), (5, 70_001, "float16"),
                                                    (64, 10**6, "float64")])
def test_what_auto_goes_by_is_the_planners_model(ranks, k, values):
    cluster = Cluster.one_rank_per_host(ranks, Link(GBPS, LATENCY_US))
    entries = 4 * Layout(k, values).words
    found = exchange_seconds(ranks, k, values)
    assert found["allgather"] == pytest.approx(collective_seconds("allgather", entries, cluster))
    assert found["sparse_allreduce"] == pytest.approx(
        collective_seconds("alltoall", entries, cluster) + collective_seconds("allgather", 8 * WORDS, cluster)
        + collective_seconds("allgather", entries / ranks, cluster))


@pytest.mark.parametrize(("ratio", "values"), [(0.01, "float32"), (0.02, "float16"), (0.001, "float64")])
@pytest.mark.parametrize(("way", "itemsize"), [(plan_dense, 4), (half, 2)])
def test_break_even_is_where_the_bytes_cross(ratio, values, way, itemsize):
    numel = 10_000_000
    ranks = break_even_ranks(ratio, itemsize, values)

    def saves(ranks):
        given = (numel, ranks, ratio)
        return rank_bytes(plan_topk, *given, values=values) < rank_bytes(way, *given, values=values)

    assert saves(ranks - 1)
    assert not saves(ranks + 1)
    at = break_even_ratio(ranks, itemsize, values)
    assert at == pytest.approx(ratio, rel=1 / ranks + 1e-9)


def test_one_over_ratio():
    assert break_even_ranks(0.01, 4) == 100
    assert break_even_ranks(0.001, 4) == 1000


def test_break_even_speed_is_where_the_seconds_cross():
    def here(ranks, work):
        return replace(setup(25_000_000, ranks, 0.01), work=work), Cluster.one_rank_per_host(ranks,
                                                                                             Link(10.0))

    given, cluster = here(16, ComputeCosts())
    speed = break_even_gbps(given, cluster, "dense")

    def pays(gbps):
        at = replace(cluster, outer=Link(gbps))
        return (simulate_steps(plan_topk(given), given.workload, at).exchange
                < simulate_steps(plan_dense(given), given.workload, at).exchange)

    assert pays(0.99 * speed)
    assert not pays(1.01 * speed)
    assert break_even_gbps(*here(200, ComputeCosts()), "dense") == 0.0
    assert math.isinf(break_even_gbps(*here(16, ComputeCosts.no_compute()), "dense"))


def test_servers():
    assert moment_elements(1000, 4, "sharded", 3) == 750
    assert moment_elements(1000, 4, "rank0", 3) == 3000
    assert weight_bytes(1000, 4, "replicated") == 0
    assert weight_bytes(1000, 4, "rank0") == 4000
    assert weight_bytes(1000, 4, "sharded") == 3000


@pytest.mark.parametrize(("arguments", "said"), [
    ({"numel": 0}, "params must be at least 1"), ({"ranks": 0}, "ranks must be at least 1"),
    ({"ratio": 0}, r"ratio must be in \(0, 1\]"), ({"values": "int8"}, "values must be one of"),
])
def test_bad_arguments(arguments, said):
    good = {"numel": 1000, "ranks": 2, "ratio": 0.1}
    with pytest.raises(ValueError, match=said):
        setup(**{**good, **arguments})
    with pytest.raises(ValueError, match="gbps must be in"):
        Link(0)

"""The simulator of a step against schedules that can be written down, and what must hold of any."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_ext.planning import (
    Cluster,
    ComputeCosts,
    Link,
    Stragglers,
    Workload,
    collective_seconds,
    collective_traffic,
    simulate_steps,
)
from hvd_ext.planning.exchange import Exchange, Message, Stage
from hvd_ext.planning.links import COLLECTIVES
from hvd_ext.planning.methods import (
    METHODS,
    Scenario,
    plan_delay,
    plan_delayed,
    plan_dense,
    plan_exchanges,
    plan_sharded,
    plan_topk,
    with_server,
)

ONE = ((1000, 1000),)  # a single gradient: it is there when the backward pass ends
NUMEL = 1_000_000
LINK = Link(1.0, 50.0)
BYTE = 8e-9  # seconds on it
HOP = 50e-6
FREE = ComputeCosts.no_compute()


def step(way, shapes=ONE, ranks=4, compute=0.0, link=LINK, work=FREE, cluster=None, **more):
    cluster = cluster or Cluster.one_rank_per_host(ranks, link)
    workload = Workload(shapes, compute)
    setup = Scenario(workload, cluster.ranks, work)
    return simulate_steps(way(setup), workload, cluster, **more)


def ring(size, ranks):
    return 2 * (ranks - 1) / ranks * size * BYTE + 2 * (ranks - 1) * HOP


# Closed forms

@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_one_gradient_takes_the_ring_after_the_compute(ranks):
    found = step(plan_dense, ranks=ranks, compute=0.3)
    assert found.exchange == pytest.approx(ring(4 * NUMEL, ranks), rel=1e-12)
    assert found.step == found.slowest == pytest.approx(0.3 + ring(4 * NUMEL, ranks), rel=1e-12)


def test_one_rank_exchanges_nothing():
    found = step(plan_dense, ranks=1, compute=0.3)
    assert (found.exchange, found.step) == (0.0, pytest.approx(0.3))


@pytest.mark.parametrize(("compute", "hidden"), [(3.0, True), (0.03, False)])
def test_of_two_gradients_the_first_is_exchanged_beside_the_second(compute, hidden):
    shapes = ((500, 1000), (500, 1000))
    found = step(plan_dense, shapes, compute=compute)
    one, forward = ring(2 * NUMEL, 4), compute / 3
    first = forward + compute / 3 + one
    assert found.step == pytest.approx(max(first, compute) + one)
    assert (first < compute) is hidden


def test_horovod_puts_together_what_waits():
    shapes = ((10, 10),) * 20
    assert step(plan_dense, shapes).exchange == pytest.approx(ring(4 * 2000, 4))
    apart = step(plan_dense, shapes, compute=300.0).step  # each is through before the next is there
    assert apart == pytest.approx(300.0 + ring(400, 4))


@pytest.mark.parametrize("compute", [0.01, 1.0])
def test_a_late_step_takes_the_longer_of_compute_and_exchange(compute):
    found = step(lambda setup: plan_delayed(setup, plan_dense(setup)), compute=compute)
    assert found.step == pytest.approx(max(compute, ring(4 * NUMEL, 4)))


def test_the_second_half_of_a_late_exchange_is_hidden_where_it_goes_on():
    half = 3 / 4 * 4 * NUMEL * BYTE + 3 * HOP
    agreement = 3 * 32 * BYTE + 3 * HOP
    both = agreement + 2 * half
    assert step(lambda setup: plan_delayed(setup, plan_delay(setup)),
                compute=100 * both).step == pytest.approx(100 * both)
    # The way back begins with the backward pass, a third of the compute after the step, at the earliest.
    short = step(lambda setup: plan_delayed(setup, plan_delay(setup)), compute=both)
    assert short.step == pytest.approx(max(both, half + agreement + max(half, both / 3)))
    stays = step(lambda setup: replace(plan_delayed(setup, plan_delay(setup)), goes_on=False), compute=1.0)
    assert stays.step == pytest.approx(1.0 + agreement + half)
    assert step(plan_delay).exchange == pytest.approx(both)


def test_what_is_computed_for_the_way_back_is_not_hidden():
    work = replace(FREE, recursion_ns=50.0)
    took = step(lambda setup: plan_delayed(setup, plan_delay(setup)), compute=1.0, work=work).step
    assert took == pytest.approx(1.0 + 50e-9 * NUMEL)


def test_sharded_takes_what_an_allreduce_takes():
    assert step(plan_sharded).exchange == pytest.approx(ring(4 * NUMEL, 4))


def test_a_server_sends_weights_after_its_update():
    work = replace(FREE, update_ns=10.0)
    dense = step(plan_dense, work=work).exchange
    server = step(lambda setup: with_server(setup, plan_dense(setup), "rank0"), work=work).exchange
    assert server == pytest.approx(dense + 4 * NUMEL * BYTE + 3 * HOP)
    shared = step(lambda setup: with_server(setup, plan_dense(setup), "sharded"), work=work).exchange
    assert shared == pytest.approx(dense - 0.75 * 10e-9 * NUMEL + 3 / 4 * 4 * NUMEL * BYTE + 3 * HOP)


def test_what_a_rank_computes_is_part_of_the_exchange():
    work = replace(FREE, select_ns=100.0, scatter_ns=10.0)
    entries = 10_000
    extra = step(plan_topk, work=work).exchange - step(plan_topk).exchange
    assert extra == pytest.approx(1e-9 * (100 * NUMEL + 4 * entries * 10))


def test_lagged_messages_travel_during_the_compute():
    ways = {one.name: one for one in plan_exchanges(Scenario(Workload(ONE, 1.0), 4, FREE), ("seng",))}
    took = {name: simulate_steps(one, Workload(ONE, 1.0), Cluster.one_rank_per_host(4, LINK)).step for name,
            one in ways.items()}
    assert took["seng lagged"] == pytest.approx(1.0 + ring(4 * NUMEL, 4))
    assert took["seng block"] == pytest.approx(1.0 + 2 * ring(4 * NUMEL, 4))
    assert took["seng full"] > took["seng block"]


# Hosts with several ranks

TWO = Cluster(2, Link(1.0, 50.0), 4, Link(8.0, 5.0))


def test_a_flat_ring_goes_at_the_pace_of_the_link_between_hosts():
    assert collective_seconds("allreduce", 800, TWO) == pytest.approx(2 * 7 / 8 * 800 * BYTE + 14 * 50e-6)


def test_a_hierarchical_allreduce_is_one_inside_and_one_between():
    inside = 2 * 3 / 4 * 800 * BYTE / 8 + 6 * 5e-6
    between = 2 * 1 / 2 * 800 * BYTE + 2 * 50e-6
    assert collective_seconds("allreduce", 800,
                              replace(TWO, hierarchical=True)) == pytest.approx(inside + between)


@pytest.mark.parametrize("hierarchical", [False, True])
def test_all_ranks_of_a_host_send_an_alltoall_through_its_link(hierarchical):
    what = collective_traffic("alltoall", 800, replace(TWO, hierarchical=hierarchical))
    assert what.outer == 4 * 4 / 8 * 800  # 4 ranks, half of all that each sends
    assert what.rank == 7 / 8 * 800
    # Of an allgather each host takes the other's messages, as the ring brings them.
    assert collective_traffic("allgather", 100, replace(TWO, hierarchical=True)).outer == 400


def test_a_single_host_uses_no_outer_link():
    host = Cluster(1, Link(1e-3), 8, Link(8.0, 5.0))
    assert collective_seconds("allgather", 100, host) == pytest.approx(7 * 100 * BYTE / 8 + 7 * 5e-6)
    assert collective_traffic("allreduce", 800, host).outer == 0


def test_a_measured_link_stands_for_all_on_the_way():
    cluster = replace(TWO, measured={"allreduce": Link(2.0, 10.0)}, fixed_us=100.0)
    expected = 100e-6 + 2 * 7 / 8 * 800 * BYTE / 2 + 14 * 10e-6
    assert collective_seconds("allreduce", 800, cluster) == pytest.approx(expected)
    assert collective_seconds("allreduce_half", 800, cluster) == pytest.approx(expected)
    assert collective_seconds("alltoall", 800,
                              cluster) == pytest.approx(100e-6 + collective_seconds("alltoall", 800, TWO))


# Stragglers

@pytest.mark.parametrize(("kind", "amount"), [("lognormal", 0.2), ("exponential", 0.1)])
@pytest.mark.parametrize("ranks", [4, 64])
def test_a_step_waits_for_the_slowest_rank(kind, amount, ranks):
    found = step(plan_dense, ranks=ranks, compute=1.0, stragglers=Stragglers(kind, amount), steps=4000,
                 seed=1)
    generator = np.random.default_rng(99)
    drawn = (np.exp(amount * generator.normal(size=(20_000, ranks))) if kind == "lognormal"
             else 1 + amount * generator.exponential(size=(20_000, ranks)))
    slowest = drawn.max(axis=1)
    error = 4 * slowest.std() * (1 / 4000 + 1 / 20_000) ** 0.5
    assert found.step - ring(4 * NUMEL, ranks) == pytest.approx(slowest.mean(), abs=error)
    assert found.slowest - ring(4 * NUMEL, ranks) == pytest.approx(np.quantile(slowest, 0.95), rel=0.03)


def test_late_ranks_wait_for_each_other_a_step_later():
    many = {"ranks": 64, "compute": 1.0, "link": Link(1e6, 0.0), "stragglers": Stragglers("lognormal", 0.2),
            "steps": 1000}
    mean = float(np.exp(0.2**2 / 2))
    assert mean < step(lambda setup: plan_delayed(setup, plan_dense(setup)), **many).step < step(plan_dense,
                                                                                                 **many).step


def test_the_same_seed_draws_the_same():
    def once(seed):
        return step(plan_dense, compute=1.0, stragglers=Stragglers("lognormal", 0.2), seed=seed)

    assert once(3) == once(3) != once(4)


# What holds of any schedule

SHAPES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=6).map(tuple)
CLUSTERS = st.builds(
    lambda hosts, local, outer, inner, hierarchical: Cluster(hosts, Link(outer, 0.0), local, Link(inner, 0.0),
                                                             hierarchical),
    st.integers(1, 9), st.integers(1, 4), st.floats(0.01, 10), st.floats(0.01, 10), st.booleans())


@settings(max_examples=40)
@given(shapes=SHAPES, cluster=CLUSTERS, faster=st.floats(1.0, 10.0), compute=st.floats(0.0, 0.1),
       outer=st.booleans())
def test_more_bandwidth_is_never_slower(shapes, cluster, faster, compute, outer):
    name = "outer" if outer else "inner"
    better = replace(cluster, **{name: Link(getattr(cluster, name).gbps * faster, 0.0)})
    workload = Workload(shapes, compute)
    setup = Scenario(workload, cluster.ranks, ratio=0.1)
    for way in METHODS:
        took, less = (simulate_steps(way(setup), workload, one, steps=2) for one in (cluster, better))
        assert less.step <= took.step * (1 + 1e-9) + 1e-12, way(setup).name
        assert took.step >= compute * (1 - 1e-9)


@given(collective=st.sampled_from(COLLECTIVES), cluster=CLUSTERS, size=st.floats(1, 1e9),
       more=st.floats(1.0, 10.0), latency=st.floats(0, 1e3))
def test_more_bytes_hosts_or_latency_are_never_faster(collective, cluster, size, more, latency):
    took = collective_seconds(collective, size, cluster)
    slow = replace(cluster, outer=replace(cluster.outer, latency_us=latency),
                   inner=replace(cluster.inner, latency_us=latency))
    assert collective_seconds(collective, size * more, cluster) >= took
    assert collective_seconds(collective, size, slow) >= took
    # More hosts leave less of an alltoall inside of each, where the link may be the slower one.
    if cluster.hosts > 1 and (collective != "alltoall" or cluster.per_host == 1):
        assert collective_seconds(collective, size, cluster.of_hosts(cluster.hosts + 1)) >= took * (1 - 1e-12)


@given(numel=st.integers(1, 10**8))
def test_a_model_of_a_size_has_that_size(numel):
    assert Workload.of_size(numel).numel == numel


def test_names_are_unique_and_can_be_chosen():
    setup = Scenario(Workload.of_size(10**6), 8)
    names = [one.name for one in plan_exchanges(setup)]
    assert len(set(names)) == len(names) == len(METHODS)
    assert [one.name for one in plan_exchanges(setup, ("sparse", "seng f"))] == [
        "topk sparse_allreduce", "overlap, topk sparse_allreduce", "seng full"]
    with pytest.raises(ValueError, match="no method has 'nccl' in its name; there are dense"):
        list(plan_exchanges(setup, ("nccl",)))


@pytest.mark.parametrize(("make", "said"), [
    (lambda: Cluster(0, LINK), "hosts must be at least 1"),
    (lambda: Cluster(2, LINK, 0), "ranks per host must be at least 1"),
    (lambda: Cluster(2, LINK, measured={"gossip": LINK}), "a measured collective must be one of 'allreduce'"),
    (lambda: collective_traffic("gossip", 1, TWO), "collective must be one of"),
    (lambda: Link(1.0, -1.0), "latency_us must be in"),
    (lambda: ComputeCosts(pass_ns=-1.0), "pass_ns must be in"),
    (lambda: ComputeCosts.of_memory(0.0), "memory bandwidth must be in"),
    (lambda: Workload(()), "params must be at least 1"),
    (lambda: Workload(ONE, -1.0), "compute must be in"),
    (lambda: Stragglers("gamma", 0.1), "straggler must be one of"),
    (lambda: Stragglers.parse_text("lognormal:much"), "a spread of 10 % is lognormal:0.1"),
    (lambda: Stragglers.parse_text("lognormal"), "straggler must be none, lognormal:AMOUNT"),
    (lambda: Stragglers.parse_text("exponential:11"), "straggler's amount must be in"),
    (lambda: step(plan_dense, steps=1), "steps must be at least 2"),
    (lambda: Scenario(Workload(ONE), 2, rank=0), "rank must be at least 1"),
    (lambda: step(lambda setup: with_server(setup, plan_dense(setup), "rank1")), "server must be one of"),
])
def test_bad_input_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_cluster_comes_back_from_its_file():
    cluster = replace(TWO, hierarchical=True, fixed_us=7.0, measured={"alltoall": Link(3.0, 1.0)})
    assert Cluster.from_dict(cluster.to_dict()) == cluster
    with pytest.raises(KeyError):
        Cluster.from_dict({"hosts": 2})


def test_messages_that_belong_to_no_method_can_be_simulated():
    """What a method of one's own needs: stages of messages."""
    way = Exchange("mine", (Stage((Message("allreduce", 800),)), Stage((Message("broadcast", 800),), 0.5)))
    found = simulate_steps(way, Workload(ONE), Cluster.one_rank_per_host(4, LINK))
    assert found.exchange == pytest.approx(ring(800, 4) + 0.5 + 800 * BYTE + 3 * HOP)

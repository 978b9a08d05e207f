"""What is recommended, and the fit of what was measured."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_ext.planning import Cluster, ComputeCosts, Link, Workload, collective_traffic, simulate_steps
from hvd_ext.planning.break_even import break_even_gbps
from hvd_ext.planning.measure import fit_link, measure_cluster
from hvd_ext.planning.methods import Scenario, plan_exchanges
from hvd_ext.planning.recommend import BY_CHANGE, Row, recommend_method


def advice(gbps, compute, ranks=8, work=None, names=(), numel=25_000_000):
    cluster = Cluster.one_rank_per_host(ranks, Link(gbps))
    workload = Workload.of_size(numel, compute)
    setup = Scenario(workload, ranks, work or ComputeCosts.of_memory(3000.0))
    return recommend_method([Row(one, simulate_steps(one, workload, cluster), one.rank_bytes(cluster), 0.0)
                             for one in plan_exchanges(setup, names)], compute)


@pytest.mark.parametrize(("gbps", "compute", "method", "reason"), [
    (400.0, 0.2, "dense", "is hidden behind the backward pass"),
    (10.0, 0.3, "dense", "is hidden behind the backward pass"),
    (5.0, 0.2, "fp16", "MB in and out of a rank in place of 175"),
    (0.1, 0.1, "powersgd rank 4", "of dense"),
])
def test_the_least_change_that_is_fast_is_recommended(gbps, compute, method, reason):
    found = advice(gbps, compute)
    assert found is not None
    assert found.method == method
    assert reason in found.reason


def test_nothing_is_gained_where_computing_takes_longer_than_sending():
    found = advice(100.0, 0.0, work=ComputeCosts(cast_ns=50.0, select_ns=60.0, product_ns=50.0))
    assert found is not None
    assert found.method == "dense"
    assert "no way that sends less is faster by more than 10%" in found.reason


def test_late_is_recommended_only_beside_a_compute():
    names = ("overlap",)
    assert advice(1.0, 0.0, names=names) is None
    found = advice(1.0, 1.0, names=("dense", "overlap"))
    assert found is not None
    assert found.method == "overlap, fp16"
    assert found.argument == "overlap=hvd.DelayedUpdate(), compression=hvd.Compression.fp16"


def test_what_is_chosen_for_its_result_is_not_recommended_for_its_speed():
    assert advice(1.0, 0.1, names=("delay", "seng", "rank0")) is None
    assert not {"delay", "seng block", "rank0"} & set(BY_CHANGE)


def test_on_one_host_the_link_inside_decides_when_topk_pays():
    setup = Scenario(Workload.of_size(25_000_000), 8)
    inside = break_even_gbps(setup, Cluster(1, Link(1.0), 8, Link(1.0, 20.0)), "dense")
    between = break_even_gbps(setup, Cluster(8, Link(1.0, 20.0)), "dense")
    assert inside == pytest.approx(between)
    assert 0 < inside < 100


def points(collective, cluster, link, fixed, sizes=(2**16, 2**20, 2**23)):
    found = [(size, collective_traffic(collective, size, cluster)) for size in sizes]
    return [(size, fixed + link.transfer_seconds(max(one.outer, one.inner), one.outer_hops + one.inner_hops))
            for size, one in found]


@pytest.mark.parametrize("collective", ["allreduce", "allgather", "alltoall", "broadcast"])
@pytest.mark.parametrize("cluster", [Cluster(4, Link(1.0)), Cluster(2, Link(1.0), 3),
                                     Cluster(1, Link(1.0), 4)])
def test_the_link_that_was_measured_is_found(collective, cluster):
    link = Link(3.0, 40.0)
    found = fit_link(collective, points(collective, cluster, link, 0.002), cluster, 0.002)
    assert found.gbps == pytest.approx(3.0)
    assert found.latency_us == pytest.approx(40.0)


def test_short_messages_that_a_shaped_link_lets_pass_do_not_make_it_faster():
    """A token bucket of 500 kB before 1 Gbit/s, on two hosts."""
    cluster = Cluster(2, Link(1.0))
    sizes = (2**16, 2**19, 2**21, 2**23)
    taken = [(size, 1e-3 + max(size / 1e9, (size - 5e5) * 8e-9)) for size in sizes]
    assert fit_link("allreduce", taken, cluster, 1e-3).gbps == pytest.approx(1.0, rel=0.1)


def test_noise_does_not_make_a_link_impossible():
    cluster = Cluster(4, Link(1.0))
    generator = np.random.default_rng(0)
    for _ in range(200):
        noisy = [(size, second * generator.uniform(0.1, 3.0))
                 for size, second in points("allreduce", cluster, Link(3.0, 400.0), 0.0)]
        found = fit_link("allreduce", noisy, cluster, 0.0)
        assert found.gbps > 0
        assert found.latency_us >= 0


class Alone:
    rank, size, local_size = 0, 1, 1


def test_one_rank_measures_nothing():
    with pytest.raises(ValueError, match="one rank has no link to measure; start two or more"):
        measure_cluster(1000, voice=Alone())

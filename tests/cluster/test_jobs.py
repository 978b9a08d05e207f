"""Jobs over three hosts: every extension and server, both launchers, a host that is cut off."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cluster import programs
from tests.cluster.hosts import Cluster
from tests.cluster.programs import HOSTS, cut_when_asked
from tests.ranks import run_ranks

pytestmark = [pytest.mark.cluster, pytest.mark.distributed]


def test_every_extension_and_server_gives_what_it_gives_on_one_host(cluster):
    with cluster.ranks() as ranks:
        assert ranks.run(programs.place) == [(f"node{k + 1}", k, 1) for k in range(HOSTS)]
        apart = ranks.run(programs.every_way, timeout=180)
    together = run_ranks(programs.every_way, HOSTS, timeout=180)
    for one in apart[1:]:
        for way, weights in one.items():
            np.testing.assert_array_equal(weights, apart[0][way], err_msg=str(way))
    for way, weights in together[0].items():  # MPI adds in another order over a network than in memory
        np.testing.assert_allclose(apart[0][way], weights, rtol=1e-5, atol=1e-6, err_msg=str(way))


@pytest.mark.parametrize("options", [["--gloo"], ["--mpi"]], ids=lambda o: o[0])
def test_horovodrun(cluster, options):
    with cluster.ranks(launcher="horovodrun", options=options) as ranks:
        placed = ranks.run(programs.place)
    assert sorted(placed) == [(f"node{k + 1}", k, 1) for k in range(HOSTS)]


def test_two_ranks_a_host(cluster):
    with cluster.ranks(2 * 2 + 1) as ranks:
        placed = ranks.run(programs.place)
    assert [host for host, _, _ in placed] == ["node1", "node1", "node2", "node2", "node3"]


def test_a_rank_at_work_is_waited_for_where_names_do_not_resolve():
    with Cluster(2, rate="1gbit", resolve=False) as nameless, \
            nameless.ranks(env={"HVD_EXT_TIMEOUT": "3,30"}) as ranks:
        assert ranks.run(programs.busy, 9.0) == [True, True]


@pytest.mark.parametrize(("method", "server"), [("plain", None), ("topk", None), ("delay", "rank0"),
                                                ("plain", "sharded")])
def test_a_host_that_is_cut_off_is_an_error_on_all_others(tmp_path, method, server):
    with Cluster(HOSTS, rate="1gbit") as cluster:
        cut_when_asked(cluster, tmp_path, "node3", asking=HOSTS)
        ranks = cluster.ranks(env={"HVD_EXT_TIMEOUT": "4,20"})
        try:
            outcomes = ranks.run(programs.cut_off, method, server, str(tmp_path), timeout=60, check=False)
            output = ranks.output()
        finally:
            ranks.close(kill=True)
    for one in outcomes[:2]:
        assert one.state in ("raised", "died"), (str(one), output)
    assert "rank 2 does not answer: its process or its host is stopped, dead or cut off" in output

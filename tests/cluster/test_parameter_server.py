"""The parameter server over three hosts, also when one is cut off."""

from __future__ import annotations

import numpy as np
import pytest

from tests.async_ps.runs import flat, start
from tests.cluster import programs
from tests.cluster.hosts import Cluster
from tests.cluster.programs import HOSTS, cut_when_asked

pytestmark = [pytest.mark.cluster, pytest.mark.distributed]


def test_a_worker_that_is_cut_off_is_left_out(tmp_path):
    with Cluster(HOSTS, rate="1gbit") as cluster:
        cut_when_asked(cluster, tmp_path, "node3")
        ranks = cluster.ranks(init=None)
        options = {"lr": 0.02, "rule": "dc-asgd-c", "lam": 0.3, "worker_timeout": 3.0, "server_timeout": 8.0}
        try:
            server, worker, lost = ranks.run(programs.serve, options, 40, str(tmp_path), timeout=60,
                                             check=False)
        finally:
            ranks.close(kill=True)
    assert server.state == worker.state == "returned", (str(server), str(worker))
    report = server.value["report"]
    assert [one.updates for one in report.workers] == [40, 5]
    assert "silent for" in report.workers[1].left_out
    assert lost.state != "returned"
    np.testing.assert_array_equal(worker.value["weights"], server.value["weights"])


def test_the_parameter_server(cluster):
    options = {"lr": 0.02, "rule": "asgd"}
    with cluster.ranks(init=None) as ranks:
        server, *workers = ranks.run(programs.serve, options, 20, None)
    assert server["report"].updates == 40
    assert not np.array_equal(server["weights"], flat(start()))
    for one in workers:
        np.testing.assert_array_equal(one["weights"], server["weights"])

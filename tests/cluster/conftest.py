"""A cluster for the tests of one file."""

from __future__ import annotations

import pytest

from tests.cluster.hosts import Cluster
from tests.cluster.programs import HOSTS


@pytest.fixture(scope="module")
def cluster():
    with Cluster(HOSTS, rate="1gbit") as made:
        yield made

"""Four ranks without Horovod, kept for all tests of one module."""

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="module")
def _own_pool():
    holder = {}
    yield holder
    if holder:
        holder["pool"].close()


@pytest.fixture
def pool(_own_pool):
    """Four running ranks; new ones after a test that broke them."""
    running = _own_pool.get("pool")
    if running is None or not running.alive or not running.folder.exists():
        running = _own_pool["pool"] = Ranks(4, init=None)
    return running

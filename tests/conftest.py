"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict[tuple[int, str], Ranks]]:
    pools: dict[tuple[int, str], Ranks] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def ranks(_pools: dict[tuple[int, str], Ranks]) -> Callable[..., Ranks]:
    """``ranks(n, init="torch")``: n running ranks, kept for the next test that asks for the same.

    Only one set of ranks lives at a time, so that idle ones do not take the cores.
    """

    def get(size: int, init: str = "torch") -> Ranks:
        pool = _pools.get((size, init))
        if pool is not None and pool.alive and pool.folder.exists():
            return pool
        for other in _pools.values():
            other.close()
        _pools.clear()
        pool = _pools[(size, init)] = Ranks(size, init=init)
        return pool

    return get


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    try:
        import torch

        present = torch.cuda.is_available()
    except ImportError:
        present = False
    if not present:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))

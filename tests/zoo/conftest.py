"""Models of libraries, tiny: run when asked for by ``-m zoo``."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "zoo: models of libraries; run by `make test-zoo`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has the marker, unless it is asked for."""
    if "zoo" in (config.option.markexpr or ""):
        return
    left = [item for item in items if item.get_closest_marker("zoo")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]

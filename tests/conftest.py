"""Fixtures of the whole suite."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.cluster.hosts import missing
from tests.ranks import Ranks

# The same examples each time, as of any test; new ones with --hypothesis-profile=new. Slow is not wrong.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("new", deadline=None)
hypothesis.settings.load_profile("same")

# Markers of tests that run only when ``-m`` names them; each has a target of its own in the Makefile.
ON_REQUEST = {"extended", "soak", "cluster", "zoo", "gpu_build"}

# Files that import a framework, of which none can be collected without it; ranks' own imports come on top.
NEEDS = {
    "torch": re.compile(r"^(from|import) (torch|hvd_ext\.torch|horovod\.torch|examples\.(torch|resnet)"
                        r"|tests\.torch)|examples import torch|horovod\.torch as", re.M),
    "tensorflow": re.compile(r"^(from|import) (tensorflow|keras|hvd_ext\.tensorflow|tests\.tensorflow)"
                             r"|importorskip\(\"tensorflow\"", re.M),
}


def _left_out() -> list[str]:
    """Frameworks that are not installed, or that ``make FRAMEWORKS=...`` leaves out."""
    wanted = os.environ.get("HVD_EXT_FRAMEWORKS", ",".join(NEEDS)).split(",")
    return [name for name in NEEDS if name not in wanted or importlib.util.find_spec(name) is None]


LEFT_OUT = _left_out()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out files that need a framework which is left out; the header says which."""
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    text = collection_path.read_text()
    return True if any(NEEDS[name].search(text) for name in LEFT_OUT) else None


def pytest_report_header() -> str:
    """Say what this run cannot show."""
    return f"left out: every test that needs {' or '.join(LEFT_OUT)}" if LEFT_OUT else "frameworks: all"


def _size_of(item: pytest.Item) -> int:
    callspec = getattr(item, "callspec", None)
    return int(callspec.params.get("size", 2)) if callspec else 2


def _front_end_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("front_end", "")) if callspec else ""


class Pool:
    """``ranks(n, init="torch")``: n running ranks, kept for the next test that asks for the same.

    Only one set of ranks lives at a time: Horovod's background thread takes a third of a core while it has
    nothing to do. ``end()`` is for a test that starts ranks of its own.
    """

    def __init__(self) -> None:
        self._asked = (0, "")
        self._ranks: Ranks | None = None

    def __call__(self, size: int, init: str = "torch") -> Ranks:
        kept = self._ranks
        if kept is None or self._asked != (size, init) or not (kept.alive and kept.folder.exists()):
            self.end()
            self._asked, self._ranks = (size, init), Ranks(size, init=init)
        assert self._ranks is not None
        return self._ranks

    def end(self) -> None:
        """End the ranks that are kept."""
        if self._ranks is not None:
            self._ranks.leave()
        self._ranks = None


@pytest.fixture(scope="session")
def _pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.end()


@pytest.fixture
def ranks(_pool: Pool) -> Pool:
    """Ranks that several tests use."""
    return _pool


@pytest.fixture(autouse=True)
def _room(request: pytest.FixtureRequest, _pool: Pool) -> None:
    if request.node.get_closest_marker("distributed") and not _kept(request.node):
        _pool.end()


def _kept(item: pytest.Item) -> bool:
    """Whether a test uses the ranks of others."""
    return "ranks" in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Group a file's tests by the ranks they use, so that ranks start seldom; skip what cannot run here."""
    for item in items:
        if _kept(item) and not item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.distributed)
    asked = set(re.findall(r"\w+", config.option.markexpr))
    left = [item for item in items if any(mark.name in ON_REQUEST - asked for mark in item.iter_markers())]
    if left:
        config.hook.pytest_deselected(items=left)
        gone = set(map(id, left))
        items[:] = [item for item in items if id(item) not in gone]
    hosts = [item for item in items if item.get_closest_marker("cluster")]
    if hosts and (why := missing()):
        for item in hosts:
            item.add_marker(pytest.mark.skip(reason=why))
    order = {path: number for number, path in enumerate(dict.fromkeys(i.path for i in items))}
    items.sort(key=lambda item: (order[item.path], _kept(item), _front_end_of(item), _size_of(item)))
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

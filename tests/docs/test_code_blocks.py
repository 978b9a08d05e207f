"""Every Python block of README.md and docs/*.md is run, on two ranks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LEFT_OUT, Pool
from tests.docs.blocks import BLOCKS, Block, blocks_in, front_end_of
from tests.docs.execution import run_block

PYTHON = sorted(blocks_in("python"), key=front_end_of)  # so that each front end's ranks start once
RANKS = {"docs/async.md": 3}  # with one worker no gradient is late

# Blocks that cannot be run, by page and heading, with the reason.
NOT_RUN = {
    ("docs/cluster.md", "A cluster on one machine"): "it makes hosts, as root: make test-cluster",
}
NEEDED = {  # packages that some blocks need
    ("docs/drop_in.md", "PyTorch Lightning"): "lightning",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, _pool: Pool) -> Iterator[Path]:
    """Of this module's blocks; their ranks have rules and reducers registered, and are used by no other."""
    _pool.end()
    yield tmp_path_factory.mktemp("shared")
    _pool.end()


def test_every_block_says_its_language():
    assert {block.place for block in BLOCKS if block.language not in ("python", "sh", "text")} == set()


def test_lists_of_blocks_name_blocks_that_exist():
    assert {*NOT_RUN, *NEEDED} <= {(block.page, block.section) for block in PYTHON}


@pytest.mark.distributed
@pytest.mark.parametrize(("block", "size"), [(block, RANKS.get(block.page, 2)) for block in PYTHON],
                         ids=[block.place for block in PYTHON])
def test_python_block_runs(block: Block, size: int, ranks: Pool, folder: Path) -> None:
    if front_end_of(block) in LEFT_OUT:
        pytest.skip(f"{front_end_of(block)} is left out")
    where = block.page, block.section
    if where in NEEDED and importlib.util.find_spec(NEEDED[where]) is None:
        pytest.skip(f"{NEEDED[where]} is not installed")
    if where in NOT_RUN:
        pytest.skip(NOT_RUN[where])
    ranks(size, init=front_end_of(block)).run(run_block, block.place, str(folder))

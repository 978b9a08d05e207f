"""The matrix of docs/combinations.md is that of a new run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from scripts.combinations import BEGIN, END, SHORT, matrix_of, try_all
from tests.conftest import LEFT_OUT, Pool
from tests.docs.blocks import ROOT


def read_matrix() -> dict[tuple[str, str], str]:
    """The page's cells by row and column."""
    lines = (ROOT / "docs/combinations.md").read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()
    cells = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines]
    return {(row[0], column): cell for row in cells[2:]
            for column, cell in zip(SHORT, row[1:], strict=True)}


@pytest.fixture
def own_ranks(_pool: Pool) -> Iterator[None]:
    """Of this test alone: a pair that fails may leave an exchange behind."""
    _pool.end()
    yield
    _pool.end()


@pytest.mark.distributed
@pytest.mark.usefixtures("own_ranks")
@pytest.mark.parametrize("framework", [
    "torch", pytest.param("tensorflow", marks=[pytest.mark.extended, pytest.mark.timeout(1200)])])
def test_matrix_is_current(framework: str, ranks: Pool) -> None:
    if framework in LEFT_OUT:
        pytest.skip(f"{framework} is left out")
    found = ranks(2, init=framework).run(try_all, framework, timeout=900.0)
    page, short = read_matrix(), {"torch": "PT", "tensorflow": "TF"}[framework]
    for one in found:
        for pair, refusal in one.items():
            first, _, second = pair.partition(" + ")
            said = page[first, second or first] in ("yes", short)
            assert said == (refusal is None), (pair, refusal)


def test_matrix_is_symmetric_and_whole():
    page = read_matrix()
    assert {first for first, _ in page} == set(SHORT)
    assert all(page[first, second] == page[second, first] for first, second in page)


def test_a_pair_that_works_in_one_front_end_is_shown_so():
    found = {"torch": dict.fromkeys(SHORT), "tensorflow": {**dict.fromkeys(SHORT), "SENG": "ValueError: no"}}
    assert "| SENG |  |  |  |  |  | **PT** |" in matrix_of(found)

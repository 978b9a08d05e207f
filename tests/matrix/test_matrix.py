"""Ranks that disagree, die, stop or go their own way: no combination hangs."""

from __future__ import annotations

import collections
import importlib.util

import pytest

from tests.matrix.cases import drawn_cases, quick_cases, run, wrong

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.idle_ranks]


COUNTS: collections.Counter[str] = collections.Counter()  # conftest.py prints it


def check(case):
    if importlib.util.find_spec(case.front_end) is None:
        pytest.skip(f"{case.front_end} is not installed")
    ended = run(case)
    COUNTS.update(["cases", "hung" if ended.status is None else "ended"])
    found = wrong(case, ended)
    assert found is None, f"{case}: {found} after {ended.seconds:.0f} s\n{ended.output[-4000:]}"


@pytest.mark.parametrize("case", quick_cases(), ids=str)
def test_each_fault(case):
    check(case)


@pytest.mark.soak
@pytest.mark.parametrize("case", drawn_cases(), ids=str)
def test_every_combination(case):
    check(case)

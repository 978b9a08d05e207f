"""Ranks that disagree, die, stop or go their own way: no combination hangs."""

from __future__ import annotations

import importlib.util

import pytest

from tests.matrix.cases import every_case, quick_cases, run, wrong

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def check(case):
    if importlib.util.find_spec(case.front_end) is None:
        pytest.skip(f"{case.front_end} is not installed")
    ended = run(case)
    found = wrong(case, ended)
    assert found is None, f"{case}: {found} after {ended.seconds:.0f} s\n{ended.output[-4000:]}"


@pytest.mark.parametrize("case", quick_cases(), ids=str)
def test_each_fault(case):
    check(case)


@pytest.mark.soak
@pytest.mark.parametrize("case", every_case(), ids=str)
def test_every_combination(case):
    check(case)

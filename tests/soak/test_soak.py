"""Kill it anywhere: after each strike training goes on from the last checkpoint, bit for bit."""

from __future__ import annotations

import collections
import importlib.util
import os

import pytest

from tests.soak.cases import Strike, carry_out, drawn

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
COUNTS: collections.Counter[str] = collections.Counter()  # conftest.py prints it
COUNT, SEED = int(os.environ.get("HVD_EXT_SOAK", "100")), int(os.environ.get("HVD_EXT_SEED", "0"))


def strike_at(strike):
    needs = {"tensorflow": "tensorflow"}.get(strike.kind, "" if "servers" in strike.kind else "torch")
    if needs and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    if strike.fault == "full" and os.geteuid() != 0:
        pytest.skip("a small disk is mounted, which needs root")
    COUNTS["struck", strike.kind, strike.fault] += 1
    carry_out(strike)
    COUNTS["went on", strike.kind, strike.fault] += 1


@pytest.mark.parametrize("strike", [
    Strike(0, "torch", "topk", "kill", 1, 5, 0.9, 0),
    Strike(1, "torch", "topk", "full", 0, 0, 0.5, 0),
    Strike(2, "servers 2", "", "kill", 1, 0, 0.9, 0),
], ids=str)
def test_three_strikes(strike):
    strike_at(strike)


@pytest.mark.soak
@pytest.mark.parametrize("strike", drawn(COUNT, SEED), ids=str)
def test_strikes_at_random(strike):
    strike_at(strike)

"""Declared state: what a declaration may say, and the docs' table of all declarations."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd_ext.state import (
    GATHER,
    KEEP,
    LOSS_SCALE,
    LOST_RESIDUALS,
    MEAN,
    RANK,
    SHARD,
    STEPS,
    Part,
    complete_declaration,
    split_state,
)
from scripts.state_table import table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"


def test_the_page_has_the_table():
    assert table() in PAGE.read_text()


def test_resizing_follows_from_the_scope():
    assert (Part("a").resize, Part("a", RANK).resize, Part("a", SHARD).resize) == (KEEP, MEAN, GATHER)


@pytest.mark.parametrize(("wrong", "said"), [
    ({"scope": "everyone"}, r'scope of the state "a" must be one of .*got \'everyone\''),
    ({"layout": "rows"}, r'layout of the state "a" must be one of'),
    ({"resize": MEAN}, r"resize of .* must be one of \('', 'keep'\), got 'mean'"),
    ({"scope": SHARD, "resize": "drop"}, r"must be one of \('', 'gather'\)"),
])
def test_wrong_declarations(wrong, said):
    with pytest.raises(ValueError, match=said):
        Part("a", **wrong)


def test_what_follows_from_a_declaration():
    kept = Part("kept", RANK, scaled=True)
    assert complete_declaration([STEPS]) == (STEPS,)
    assert complete_declaration([STEPS, kept]) == (LOSS_SCALE, STEPS, kept, LOST_RESIDUALS)
    assert complete_declaration([Part("slice", SHARD)]) == (Part("slice", SHARD),)


def test_a_saved_state_is_split_by_owner():
    parts = [STEPS, Part("residual", RANK, "residuals"), Part("loss_scale", RANK)]
    state = {"steps": 3, "residual": {"w": 1}, "loss_scale": 8.0, "unknown": [1]}
    assert split_state(parts, state) == ({"steps": 3}, ["residuals", "unknown"])
    assert split_state(parts, {"steps": 3, "residual": {}}) == ({"steps": 3}, [])

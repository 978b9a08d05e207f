"""Figures of a report as scalars."""

from __future__ import annotations

import pytest

from hvd_ext.reporting.tensorboard import log_report, scalars


class Writer:
    def __init__(self):
        self.seen = {}

    def add_scalar(self, tag, value, step):
        self.seen[tag] = (value, step)


class Reporting:
    def report(self):
        return {"sent": {"gradients": 8}, "step_taken": True, "where": "rank0", "nothing": None,
                "preconditioner": {"layers": [{"layer": "0.conv", "age": 3, "kind": "conv"}], "damping": 0.5},
                "shapes": [1, 2]}


def test_numbers_by_path():
    expected = {"a/sent/gradients": 8.0, "a/step_taken": 1.0, "a/preconditioner/layers/0.conv/age": 3.0,
                "a/preconditioner/damping": 0.5}
    assert scalars(Reporting().report(), "a") == expected
    writer = Writer()
    log_report(writer, Reporting(), 7, prefix="a")
    assert writer.seen == {tag: (value, 7) for tag, value in expected.items()}


def test_what_is_no_writer_and_what_has_no_report():
    with pytest.raises(TypeError, match=r"add_scalar\(tag, value, step\)"):
        log_report(object(), Reporting(), 0)
    with pytest.raises(TypeError, match=r"optimizer must have report\(\).*got dict"):
        log_report(Writer(), {}, 0)

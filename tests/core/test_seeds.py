"""Runs of several seeds are summarised so that a diverged one is seen."""

import math

import pytest

from examples.seeds import summarize


def test_one_diverged_run_does_not_move_the_median():
    summary = summarize([78.3, 4.2, 12.8, 3.9, 4.4])
    assert (summary.median, summary.low, summary.high, summary.diverged) == (4.4, 3.9, 78.3, 1)
    assert str(summary) == "4.4 (3.9 to 78.3; 1 of 5 diverged)"


def test_without_a_diverged_run_nothing_is_said_of_it():
    assert summarize([3.9, 3.1, 4.4, 2.8, 2.8]).describe(2) == "3.10 (2.80 to 4.40)"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_a_diverged_run(value):
    assert summarize([1.0, 2.0, value]).diverged == 1


def test_nothing_cannot_be_summarised():
    with pytest.raises(ValueError, match="no run"):
        summarize([])

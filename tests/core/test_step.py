"""The step as a state machine: which call reduces, and which is an error."""

from __future__ import annotations

import pytest

from hvd_ext.step import ReducedGradients, StepState
from hvd_ext.uneven_inputs import CODES, Attendance, Decision, attendance_row


def state(**fields):
    return StepState(**fields)


def on_step(one, *, synchronizes=True, begun=False, repeatable=True, ranks=2):
    return one.reduces_on_step("TopK", synchronizes=synchronizes, begun=begun, repeatable=repeatable,
                               ranks=ranks)


@pytest.mark.parametrize(("one", "repeatable", "reduces"), [
    (state(), False, True), (state(), True, True),
    (state(reduced=True), True, True), (state(reduced=True), False, False),  # Horovod reduces again
    (state(reduced=True, settled=True), True, False),
    (state(reduced=True, settled=True, extended=True), True, True),
])
def test_what_synchronize_reduces(one, repeatable, reduces):
    assert one.reduces_on_synchronize("TopK", repeatable=repeatable) is reduces


@pytest.mark.parametrize(("one", "options", "reduces"), [
    (state(), {}, True), (state(), {"synchronizes": False}, False),
    (state(), {"synchronizes": False, "begun": True, "ranks": 1}, False),
    (state(reduced=True), {"synchronizes": False, "repeatable": False}, False),
    (state(reduced=True, settled=True), {"repeatable": False}, False),
    (state(reduced=True), {}, True), (state(reduced=True, settled=True, extended=True), {}, True),
])
def test_what_a_step_reduces(one, options, reduces):
    assert on_step(one, **options) is reduces


@pytest.mark.parametrize(("one", "options", "said"), [
    (state(reduced=True), {"repeatable": False}, r"TopK cannot do: .*skip_synchronize"),
    (state(reduced=True, extended=True), {"repeatable": False}, "backward_passes_per_step=N"),
    (state(reduced=True, extended=True), {"repeatable": False, "synchronizes": False},
     r"optimizer\.zero_grad\(\)"),
    (state(), {"synchronizes": False, "begun": True}, r"call optimizer\.synchronize\(\)"),
])
def test_steps_that_are_errors(one, options, said):
    with pytest.raises(RuntimeError, match=said):
        on_step(one, **options)


def test_a_reduction_begins_and_ends():
    one = state(extended=True, settled=True)
    one.begin_reduced(False)
    assert (one.reduced, one.good, one.settled, one.extended) == (True, False, False, False)
    one.reset()
    assert one == StepState()


class Gradient:
    """Something that a weak reference can be made to."""


def test_reduced_gradients_are_known_until_they_are_replaced_or_gone():
    known, first, second = ReducedGradients(), Gradient(), Gradient()
    known.remember_gradients([("a", first), ("b", second), ("c", None)])
    assert known
    assert known.includes_gradient("a", first)
    assert not known.includes_gradient("a", second)
    assert not known.includes_gradient("c", None)
    del second
    assert not known.includes_gradient("b", None)
    known.forget_gradients()
    assert not known
    assert not known.includes_gradient("a", first)


@pytest.mark.parametrize(("present", "root"), [([True, True, True], 0), ([False, True, False], 1),
                                               ([False, False, False], None)])
def test_who_has_a_batch(present, root):
    rows = [attendance_row(one, 4.0 * one, 77, rank, 3) for rank, one in enumerate(present)]
    found = Attendance.from_sum(sum(rows), 3)
    assert (found.active, found.samples, found.root) == (sum(present), 4.0 * sum(present), root)
    assert found.missing == (0 < sum(present) < 3)
    assert found.alike
    assert not Attendance.from_sum(sum(rows[:2]) + attendance_row(present[2], 0.0, 78, 2, 3), 3).alike


@pytest.mark.parametrize("code", CODES)
def test_a_decision_comes_through_a_sum(code):
    decision = Decision(code, touched=True, max_norm=0.1, norm_type=float("inf"))
    total = decision.encode_row(5, root=True) + decision.encode_row(5, root=False) + Decision.empty_row(5)
    assert Decision.from_sum(total, 2) == decision


def test_decisions_that_differ_are_an_error():
    total = Decision("update").encode_row(5, root=True) + Decision("clip").encode_row(5, root=False)
    with pytest.raises(RuntimeError, match=r"'update': 1, 'clip': 1"):
        Decision.from_sum(total, 2)

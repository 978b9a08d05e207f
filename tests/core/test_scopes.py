"""Scopes: the part of collectives' names that belongs to one optimizer."""

from __future__ import annotations

from hvd_ext.consistency.scopes import SharedName, open_scope

PARAMETERS = []  # of all tests: an address that is free could be taken by the next one


def scope(*names, process_set=0, members=None):
    PARAMETERS.append([object()] if members is None else members)
    return open_scope(process_set, names, PARAMETERS[-1])


def test_optimizers_of_other_parameters_have_other_scopes_whatever_their_order():
    heads = scope("head0.weight"), scope("head1.weight")
    again = scope("head1.weight", process_set=5), scope("head0.weight", process_set=5)
    assert [one.label for one in heads] == [one.label for one in reversed(again)]
    assert heads[0].label != heads[1].label
    assert heads[0].number == heads[1].number == 0


def test_optimizers_of_equal_names_are_numbered_and_give_their_number_back():
    first, second = scope("p"), scope("p")
    assert (first.number, second.number) == (0, 1)
    assert second.label == f"{first.label}.1"
    label = first.label
    del first
    assert scope("p").label == label


def test_an_optimizer_made_again_over_its_parameters_has_its_scope_again():
    members = [object(), object()]
    kept = scope("p", members=members)
    kept.keep_whole("p")
    again = scope("p", members=members)
    assert (again.label, again.keep_whole("p")) == (kept.label, "p")


def test_a_gradient_keeps_horovods_name_unless_another_optimizer_has_it():
    first, second = scope("p", "q"), scope("p", "r")
    assert [first.keep_whole("p"), second.keep_whole("r")] == ["p", "r"]
    assert second.keep_whole("p") == f"p@{second.label}"
    assert scope("p", "r", process_set=3).keep_whole("p") == "p"
    assert first.keep_whole("p") == "p"


def test_an_optimizer_that_a_cycle_keeps_takes_no_name():
    kept = scope("x")
    kept.itself = kept
    kept.keep_whole("x")
    label = kept.label
    del kept
    again = scope("x")
    assert (again.label, again.keep_whole("x")) == (label, "x")


def test_names_of_messages_in_flight_stay_taken_by_an_optimizer_that_is_gone():
    members = [object()]
    dropped = scope("left", members=members)
    dropped.keep_whole("left")
    label = dropped.label
    dropped.leave_behind()
    del dropped
    again, other = scope("left", members=members), scope("left")
    assert (again.label, other.label) == (f"{label}.1", f"{label}.2")
    assert again.keep_whole("left") == f"left@{label}.1"


def test_garbage_is_collected_once_for_all_names(monkeypatch):
    names = [f"many{number}" for number in range(1000)]
    first, second = scope(*names), scope(*names)
    first.keep_all_whole(names)
    collected = []
    monkeypatch.setattr("gc.collect", lambda: collected.append(True))
    assert second.keep_all_whole([*names, "own"])[-2:] == [f"many999@{second.label}", "own"]
    assert len(collected) == 1


def test_a_complete_name_gets_no_scope():
    one = scope("p")
    assert one.add_to("topk/bucket0") == f"topk/bucket0@{one.label}"
    assert one.add_to(SharedName("hvd_ext/consistency")) == "hvd_ext/consistency"
    assert one.add_to(one.keep_whole("p")) == "p"

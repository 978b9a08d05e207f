"""Owners are balanced and alike everywhere; which checkpoint fits where."""

from __future__ import annotations

import pytest

from hvd_ext.sharding import OwnedState, assign_owners, check_loadable, owned_elements, plan_owners
from hvd_ext.sharding.ownership import EVERY_RANK


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_no_rank_owns_more_than_the_mean_and_one_parameter(ranks):
    numels = [7, 4096, 64, 64, 1000, 0, 1, 2304, 2304, 640, 10, 512]
    owned = assign_owners(numels, ranks)
    held = owned_elements(owned, numels, ranks)
    assert sum(held) == sum(numels)
    assert max(held) <= sum(numels) / ranks + max(numels)
    assert assign_owners(numels, ranks) == owned


def test_equal_parameters_are_dealt_evenly():
    assert assign_owners([5] * 6, 3) == [0, 1, 2, 0, 1, 2]


def test_later_parameters_go_where_least_is():
    assert assign_owners([10, 1], 2, loads=[100, 95]) == [1, 0]


def test_owners_of_each_server():
    assert plan_owners("rank0", [3, 2], 4) == [0, 0]
    assert plan_owners("replicated", [3, 2], 4) == [EVERY_RANK] * 2
    assert plan_owners("sharded", [3, 2], 2) == [0, 1]
    assert owned_elements(plan_owners("replicated", [3, 2], 2), [3, 2], 2) == [5, 5]


def test_what_can_be_loaded_where():
    whole = OwnedState("rank0", 0, 2, None)
    part = OwnedState("sharded", 1, 2, (1, 3))
    nothing = OwnedState("rank0", 1, 2, ())
    for here in (whole, part, nothing, OwnedState("replicated", 0, 4, None)):
        check_loadable(None, here)
        check_loadable(whole, here)
    check_loadable(part, part)
    check_loadable(nothing, nothing)
    check_loadable(part, OwnedState("sharded", 0, 4, (3,)))
    for saved, here in ((part, whole), (part, OwnedState("sharded", 0, 2, (0, 2))), (nothing, part)):
        with pytest.raises(ValueError, match=r"Save optimizer.gather_state_dict\(\)"):
            check_loadable(saved, here)
    with pytest.raises(ValueError, match="the file of rank 0 is complete"):
        check_loadable(nothing, whole)
    with pytest.raises(ValueError, match="rank 0 of 4 under no server= needs others too"):
        check_loadable(part, OwnedState("None", 0, 4, None))
    assert OwnedState.from_dict(part.to_dict()) == part

"""Who is here after a change of ranks, and what was lost with those that are not."""

from __future__ import annotations

import pytest

from hvd_ext.membership import CommitInfo, MembershipChange


def places(ranks, *, handed_on=False):
    return [CommitInfo(rank, ranks, handed_on=handed_on) for rank in range(ranks)]


@pytest.mark.parametrize(("here", "first", "changed", "joined", "handed_on", "lost"), [
    ([None, None], True, True, [0, 1], False, 0),
    (places(2), False, False, [], False, 0),
    ([*places(2, handed_on=True), None], False, True, [2], True, 0),
    ([CommitInfo(0, 3, handed_on=True), CommitInfo(1, 3, handed_on=True)], False, True, [], True, 0),
    ([CommitInfo(0, 3), CommitInfo(1, 3)], False, True, [], False, 1),
    ([CommitInfo(0, 3), CommitInfo(2, 3)], False, True, [], False, 1),
    ([CommitInfo(0, 3), CommitInfo(2, 3), None], False, True, [2], False, 1),
    # as many as before, not the same
    ([CommitInfo(0, 3), None, None], False, True, [1, 2], False, 2),
    # One that heard of the change in time and one that did not: the mean is not on all of them.
    ([CommitInfo(0, 3, handed_on=True), CommitInfo(1, 3)], False, True, [], False, 1),
    # The failure met one rank before its commit and the other after.
    ([CommitInfo(0, 2, 5), CommitInfo(1, 2, 4)], False, True, [], False, 0),
    # A rank whose last meeting failed has an older commit, of fewer ranks.
    ([CommitInfo(0, 2), CommitInfo(1, 3)], False, True, [], False, 1),
])
def test_reunion(here, first, changed, joined, handed_on, lost):
    reunion = MembershipChange.from_places(here)
    assert reunion.level == (not joined and len({place.commit for place in here}) == 1)
    assert (reunion.first, reunion.changed, reunion.joined, reunion.handed_on, reunion.lost) == (
        first, changed, joined, handed_on, lost)

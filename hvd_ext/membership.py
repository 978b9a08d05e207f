"""Which ranks are here after a change under Horovod elastic, and what the others took with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CommitInfo:
    """Where a rank's last commit was made: its rank, of how many, and the how many-th commit it was.

    ``handed_on``: all ranks knew that some may leave, and shared what each of them keeps alone.
    """

    rank: int
    ranks: int
    commit: int = 0
    handed_on: bool = False


@dataclass(frozen=True)
class MembershipChange:
    """The ranks that are here now, and the place of each one's commit; None for one that has none."""

    places: tuple[CommitInfo | None, ...]

    @classmethod
    def from_places(cls, places: Sequence[CommitInfo | None]) -> MembershipChange:
        """From all ranks' places, by rank."""
        return cls(tuple(places))

    @property
    def first(self) -> bool:
        """Nobody has a commit: training begins."""
        return not self._stayed

    @property
    def level(self) -> bool:
        """Whether all have made the same commit: a failure may have met some of them just before one."""
        return not self.joined and len({place.commit for place in self._stayed}) <= 1

    @property
    def changed(self) -> bool:
        """Some rank has left, joined or got another number, or has an older commit than others."""
        now = len(self.places)
        return not self.level or any(place is None or (place.rank, place.ranks) != (rank, now)
                                     for rank, place in enumerate(self.places))

    @property
    def commit(self) -> int:
        """The number of rank 0's commit, from which all go on."""
        return 0 if self.places[0] is None else self.places[0].commit

    @property
    def joined(self) -> list[int]:
        """The ranks that have no commit of their own."""
        return [rank for rank, place in enumerate(self.places) if place is None]

    @property
    def handed_on(self) -> bool:
        """Whether what a rank kept alone is the same on all that stayed."""
        return bool(self._stayed) and all(place.handed_on for place in self._stayed)

    @property
    def lost(self) -> int:
        """How many ranks left and took with them what they kept alone."""
        if self.first or self.handed_on:
            return 0
        return max(0, max(place.ranks for place in self._stayed) - len(self._stayed))

    @property
    def _stayed(self) -> list[CommitInfo]:
        return [place for place in self.places if place is not None]

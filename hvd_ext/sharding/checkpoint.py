"""Which optimizer state was saved, and where it can be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hvd_ext.reducers.registry import public_server


@dataclass(frozen=True)
class OwnedState:
    """What part of the optimizer's state a rank holds.

    Attributes:
        server, rank, size: where it was.
        owned: the numbers of the parameters, as in ``state_dict()["param_groups"]``, or None
            for all of them.
        cut: of those that are held in part, (number, start, stop): elements of the flattened parameter.
    """

    server: str
    rank: int
    size: int
    owned: tuple[int, ...] | None
    cut: tuple[tuple[int, int, int], ...] = ()

    @property
    def complete(self) -> bool:
        """Whether it is the state of every parameter."""
        return self.owned is None

    def range_of(self, number: int) -> tuple[int, int] | None:
        """The elements that are held of a parameter; None for all of them."""
        return next(((start, stop) for one, start, stop in self.cut if one == number), None)

    def holds_all_of(self, other: OwnedState) -> bool:
        """Whether all that ``other`` holds is here."""
        if self.owned is None:
            return True
        if other.owned is None or not set(other.owned) <= set(self.owned):
            return False
        for number in other.owned:
            here, there = self.range_of(number), other.range_of(number)
            if here is not None and (there is None or there[0] < here[0] or there[1] > here[1]):
                return False
        return True

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain types only."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> OwnedState:
        """What :meth:`to_dict` gave; ``cut`` is missing where parameters had one owner each."""
        owned = saved["owned"]
        return cls(saved["server"], saved["rank"], saved["size"],
                   None if owned is None else tuple(owned),
                   tuple((number, start, stop) for number, start, stop in saved.get("cut", ())))


def check_loadable(saved: OwnedState | None, here: OwnedState) -> None:
    """Refuse a saved state that lacks something this rank needs.

    Args:
        saved: what the state holds; None for a state without mark, of plain torch or Horovod.
        here: what this rank is to hold.

    Raises:
        ValueError: the state of a parameter that this rank owns is not in it.
    """
    if saved is None or saved.holds_all_of(here):
        return
    assert saved.owned is not None
    raise ValueError(
        f"this optimizer state was saved by rank {saved.rank} of {saved.size} under "
        f"{public_server(saved.server)} and holds the state of {len(saved.owned)} parameters"
        f"{' or parts of them' if saved.cut else ''}; rank "
        f"{here.rank} of {here.size} under {public_server(here.server)} needs others too. Save "
        "optimizer.gather_state_dict(), called on every rank, instead of optimizer.state_dict()"
        + ("; under server='rank0' the file of rank 0 is complete as well"
           if saved.server == "rank0" else "")
        + ". hvd.save_checkpoint and hvd.load_checkpoint do that by themselves"
    )

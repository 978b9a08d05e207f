"""Which optimizer state was saved, and where it can be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class OwnedState:
    """What part of the optimizer's state a rank holds.

    ``owned`` are the numbers of the parameters, as in ``state_dict()["param_groups"]``, or None
    for all of them.
    """

    server: str
    rank: int
    size: int
    owned: tuple[int, ...] | None

    @property
    def complete(self) -> bool:
        """Whether it is the state of every parameter."""
        return self.owned is None

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain types only."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> OwnedState:
        """What :meth:`to_dict` gave."""
        owned = saved["owned"]
        return cls(saved["server"], saved["rank"], saved["size"],
                   None if owned is None else tuple(owned))


def check_loadable(saved: OwnedState | None, here: OwnedState) -> None:
    """Refuse a saved state that lacks something this rank needs.

    Args:
        saved: what the state holds; None for a state without mark, of plain torch or Horovod.
        here: what this rank is to hold.

    Raises:
        ValueError: the state of a parameter that this rank owns is not in it.
    """
    if saved is None or saved.owned is None:
        return
    if here.owned is not None and set(here.owned) <= set(saved.owned):
        return
    raise ValueError(
        f"this optimizer state was saved by rank {saved.rank} of {saved.size} under "
        f"server={saved.server!r} and holds the state of {len(saved.owned)} parameters; rank "
        f"{here.rank} of {here.size} under server={here.server!r} needs others too. Save "
        "optimizer.gather_state_dict(), called on every rank, instead of optimizer.state_dict()"
        + ("; under server='rank0' the file of rank 0 is complete as well"
           if saved.server == "rank0" else "")
    )

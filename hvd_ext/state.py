"""What a distributed optimizer keeps between steps, part by part, and which saved parts may be loaded.

A part is shared (the same on every rank) or belongs to one rank. The optimizer's own moments are a third
kind, owned by some ranks under ``server=``; see :mod:`hvd_ext.sharding.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHARED, RANK = "shared", "rank"


@dataclass(frozen=True)
class Part:
    """One entry of a saved state.

    Attributes:
        name: its key.
        scope: ``SHARED`` or ``RANK``.
        label: what it is, for messages; "" where nobody would miss it.
    """

    name: str
    scope: str = SHARED
    label: str = ""


def split_state(parts: Sequence[Part] | None, state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The shared parts of a saved state, and the labels of those that belong to one rank and hold something.

    Args:
        parts: the declaration; None where there is none: all of it belongs to one rank then.
        state: as saved.
    """
    if parts is None:
        return {}, ["the extension's state"] if state else []
    known = {part.name: part for part in parts}
    shared = {name: value for name, value in state.items()
              if name in known and known[name].scope == SHARED}
    rest = [known.get(name, Part(name, RANK, name)).label for name, value in state.items()
            if name not in shared and value]
    own = [label for label in rest if label]
    return shared, own


def check_methods(saved: Iterable[str], here: Iterable[str]) -> None:
    """Refuse a state of an extension that is not in use.

    Args:
        saved: the extensions whose state was saved, as a user writes them.
        here: those in use.

    Raises:
        ValueError: the state of one of them would be dropped.
    """
    here = list(here)
    missing = [one for one in saved if one not in here]
    if missing:
        raise ValueError(
            f"this state was saved with {' and '.join(missing)} and is loaded by an optimizer with "
            f"{' and '.join(here) or 'no extension'}, which would drop what {missing[0]} kept; build the "
            "optimizer as it was saved, or pass reset_per_rank_state=True to drop it")


def dropped_message(dropped: Sequence[str], why: str) -> str:
    """The warning for state that begins new."""
    return (f"{why}: each rank keeps {' and '.join(dropped)} of its own, which begin new. "
            "hvd.save_checkpoint and hvd.load_checkpoint, called on every rank, bring them back")

"""The state that a distributed optimizer keeps between steps, declared part by part.

A declaration says everything that differs from one part to another: whose it is, how it is saved, and what
becomes of it when ranks leave or join. Saving, loading, resuming on another number of ranks, elastic changes
and the count of bytes are one walk over the declarations, written once for each front end. The wrapped
optimizer's own moments are owned by some ranks under ``server=``: see :mod:`hvd_ext.sharding.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHARED, RANK, SHARD = "shared", "rank", "shard"
KEEP, MEAN, GATHER, DROP = "keep", "mean", "gather", "drop"
NUMBER, BUCKETS, PARAMETERS, OWN = "number", "buckets", "parameters", "own"

RESIZES = {SHARED: (KEEP,), RANK: (MEAN, DROP), SHARD: (GATHER,)}
LAYOUTS = (NUMBER, BUCKETS, PARAMETERS, OWN)


@dataclass(frozen=True)
class Part:
    """One piece of state. The reducer holds its value in the attribute of that name.

    Attributes:
        name: its key in a saved state.
        scope: ``SHARED``: the same on every rank. ``RANK``: each rank's own. ``SHARD``: each rank has its
            slice of one whole, as :func:`hvd_ext.reducers.buckets.slice_sizes` cuts a bucket.
        label: what it is, for messages and the docs; "" where nobody would miss it.
        layout: ``NUMBER``: one number. ``BUCKETS``: a flat tensor for each bucket, by its index, saved so.
            ``PARAMETERS``: the same, saved by the names of the parameters in it. ``OWN``: an object that
            saves and loads itself.
        resize: its fate when the number of ranks changes. ``KEEP``: a rank that joins takes it over.
            ``MEAN``: every rank goes on with the mean over the ranks that had it. ``GATHER``: the slices are
            put together and cut anew. ``DROP``: it begins new. By default the first that its scope allows.
        scaled: its tensors carry the loss scale of the step that wrote them, ``state_scale``.
        start: the value of a number before the first step.
        attribute: the attribute, where its name is another.

    Raises:
        ValueError: the scope, the layout or the combination does not exist.
    """

    name: str
    scope: str = SHARED
    label: str = ""
    layout: str = NUMBER
    resize: str = ""
    scaled: bool = False
    start: float = 0
    attribute: str = ""

    def __post_init__(self) -> None:
        for what, value, allowed in (("scope", self.scope, tuple(RESIZES)), ("layout", self.layout, LAYOUTS),
                                     ("resize", self.resize, ("", *RESIZES.get(self.scope, ())))):
            if value not in allowed:
                raise ValueError(f'{what} of the state "{self.name}" must be one of {allowed}, got {value!r}')
        object.__setattr__(self, "resize", self.resize or RESIZES[self.scope][0])
        object.__setattr__(self, "attribute", self.attribute or self.name)


STEPS = Part("steps")
LOSS_SCALE = Part("loss_scale", RANK, resize=DROP, start=1.0, attribute="state_scale")
LOST_RESIDUALS = Part("lost_residuals")


def complete_declaration(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The declared parts, with those that follow from them: a loss scale, and what was lost with ranks."""
    found = tuple(parts)
    if any(part.scaled for part in found):
        found = (LOSS_SCALE, *found)
    if any(part.scope == RANK and part is not LOSS_SCALE for part in found):
        found = (*found, LOST_RESIDUALS)
    return found


def split_state(parts: Sequence[Part], state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The shared parts of a saved state, and the labels of those that belong to one rank and hold something.

    Args:
        parts: the declaration. What it does not name belongs to one rank.
        state: as saved.
    """
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

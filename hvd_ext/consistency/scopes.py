"""Names of collectives that no two optimizers share, the same on every rank.

Ranks match collectives by name. An optimizer's collectives have its scope in their names: a digest of its
parameters' names and shapes and, where several optimizers have the same, a number in the order in which they
were made. Ranks may therefore run their optimizers in any order; only optimizers that cannot be told apart
must be made in the same order on every rank.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Sequence

from hvd_ext.consistency.fingerprint import digest_parts


class SharedName(str):
    """A complete name: no scope is added to it."""

    __slots__ = ()


class Scope:
    """The part of collectives' names that belongs to one optimizer.

    Attributes:
        label: digest of the parameters, and ``.n`` for the n-th more of the same.
    """

    def __init__(self, process_set: object, code: str, members: frozenset[int]) -> None:
        self._process_set = process_set
        self._code = code
        self._members = members
        taken = {one.number for one in self._find_others(lambda one: one._code == code)}
        self.number: int = next(number for number in range(len(taken) + 1) if number not in taken)
        self.label = f"{code}.{self.number}" if self.number else code
        self._whole: dict[str, SharedName] = {}
        self._left_behind = False  # the optimizer is gone, and messages of its last step may be in flight
        self._owner: weakref.ref[object] | None = None  # the optimizer, once there is one
        _OPEN_SCOPES.add(self)

    def belong_to(self, optimizer: object) -> None:
        """Take names for as long as the optimizer lives; messages under way may live longer."""
        self._owner = weakref.ref(optimizer)

    def leave_behind(self) -> None:
        """Keep the names taken for good: the optimizer goes while messages under them may be in flight.

        When they arrive is not the same on every rank, so no later time would be either.
        """
        self._left_behind = True
        _LEFT_BEHIND.append(self)

    def _find_others(self, concerns: Callable[[Scope], object]) -> list[Scope]:
        """The scopes of other optimizers that a name is taken by.

        An optimizer over the same parameters is the same one, made again. An optimizer that nothing refers to
        any more is no other one, though a cycle (an error's traceback) may have kept it on this rank alone.
        """
        def find() -> list[Scope]:
            return [one for one in _OPEN_SCOPES if one is not self and one._process_set == self._process_set
                    and (one._left_behind or ((one._owner is None or one._owner() is not None)
                         and (one._code, one._members) != (self._code, self._members))) and concerns(one)]

        if find():
            gc.collect()
        return find()

    def add_to(self, name: str) -> str:
        """``name`` with the scope; a :class:`SharedName` as it is."""
        return name if isinstance(name, SharedName) else f"{name}@{self.label}"

    def keep_whole(self, name: str) -> SharedName:
        """``name`` as it is, for a gradient; with the scope where another optimizer has it already."""
        return self.keep_all_whole([name])[0]

    def keep_all_whole(self, names: Sequence[str]) -> list[SharedName]:
        """:meth:`keep_whole` of each name."""
        fresh = set(names) - self._whole.keys()
        if fresh:
            others = self._find_others(lambda one: not fresh.isdisjoint(one._whole))
            taken = {name for one in others for name in fresh & one._whole.keys()}
            self._whole |= {name: SharedName(f"{name}@{self.label}" if name in taken else name)
                            for name in fresh}
        return [self._whole[name] for name in names]


_OPEN_SCOPES: weakref.WeakSet[Scope] = weakref.WeakSet()  # of this process
_LEFT_BEHIND: list[Scope] = []  # kept alive here


def open_scope(process_set: object, lines: Sequence[object], members: Iterable[object]) -> Scope:
    """The scope of a new optimizer.

    Args:
        process_set: the number of the process set that it reduces over.
        lines: its parameters' names and shapes, in their order.
        members: the parameters themselves.
    """
    return Scope(process_set, f"{digest_parts(list(lines)) & 0xFFFFFF:06x}", frozenset(map(id, members)))


def outside_of_set(what: str, rank: int, members: Iterable[int]) -> str:
    """The error of a call on a rank outside of the optimizer's process set."""
    return (f"{what} on rank {rank}, outside of the process set of ranks {list(members)} that the optimizer "
            "reduces over: call it on those ranks only")

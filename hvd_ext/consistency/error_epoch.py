"""How many errors all ranks of a process set have raised together: part of the names of later collectives."""

from __future__ import annotations


class ErrorEpoch:
    """Counts errors that every rank of one process set raises, the same on every one of them.

    Messages of a step that ended so may never be answered, so that later ones must not have their names.
    """

    def __init__(self) -> None:
        self.number = 0

    def raise_together(self, message: str) -> ValueError:
        """The error for every rank to raise; a new epoch begins."""
        self.number += 1
        return ValueError(message)

    @property
    def suffix(self) -> str:
        """The end of a collective's name; empty before the first error."""
        return f".after{self.number}" if self.number else ""


_EPOCHS: dict[tuple[int, ...], ErrorEpoch] = {}


def error_epoch(ranks: tuple[int, ...]) -> ErrorEpoch:
    """The epoch of a process set: ranks outside of it do not hear of its errors.

    Args:
        ranks: its members; () for all ranks, however many they are. Not its number, which Horovod may give
            to another set later.
    """
    return _EPOCHS.setdefault(ranks, ErrorEpoch())

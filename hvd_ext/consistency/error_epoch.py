"""How many errors all ranks have raised together: part of the names of later collectives."""

from __future__ import annotations


class ErrorEpoch:
    """Counts errors that every rank raises, the same on every rank.

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


ERROR_EPOCH = ErrorEpoch()
"""Of this process."""

"""A variable of a reducer's state, under the part that declares it."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from hvd_ext.state import Part


class StateVariable(NamedTuple):
    """A variable of a reducer's state: its declaration, and the number of its bucket or variable.

    ``whole``: elements that all ranks have of it together, where it is a slice.
    """

    part: Part
    number: int | None
    variable: tf.Variable
    whole: int = 0

    @property
    def name(self) -> str:
        """Its name in a checkpoint."""
        return self.part.name if self.number is None else f"{self.part.name}_{self.number}"

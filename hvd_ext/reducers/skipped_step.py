"""Which steps count as skipped because a gradient was not finite."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SkippedStep:
    """A reduced step whose gradients are not finite, until it is skipped or thrown away.

    ``step()`` skips it; so does a GradScaler, which lowers its scale and does not call ``step()``. One that
    is thrown away does not count.

    Attributes:
        scale: the loss scale of such a step; None where the gradients are finite.
    """

    scale: float | None = None

    def begin_step(self, good: bool, scale: float) -> None:
        """The gradients have just been reduced; ``good``: they are finite."""
        self.scale = None if good else scale

    def count_committed(self) -> int:
        """1 where ``step()`` skips such a step."""
        counts, self.scale = self.scale is not None, None
        return int(counts)

    def count_abandoned(self, scale: float) -> int:
        """1 where a GradScaler has skipped such a step: its scale is lower now."""
        counts, self.scale = self.scale is not None and scale < self.scale, None
        return int(counts)

"""How one optimizer's gradients are exchanged, whatever the method: what every reducer is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def no_loss_scale() -> float:
    """The loss is not scaled."""
    return 1.0


@dataclass(frozen=True, eq=False)
class ReductionOptions:
    """What a reducer needs to know beside its method's own settings.

    Attributes:
        prefix: of the names of its collectives in Horovod's timeline.
        passes: backward passes (micro-batches) per step.
        average_passes: divide the sum over passes by their number; otherwise the loss was.
        half: send float16 (``Compression.fp16``).
        groups: Horovod's ``groups=``: which gradients share a message.
        sparse_as_dense: make sparse gradients dense.
        sparse_only: the optimizer takes nothing but sparse gradients.
        loss_scale: the factor that this step's gradients carry from mixed precision.
    """

    prefix: str
    passes: int = 1
    average_passes: bool = False
    half: bool = False
    groups: Any = None
    sparse_as_dense: bool = False
    sparse_only: bool = False
    loss_scale: Callable[[], Any] = no_loss_scale


@dataclass(frozen=True, eq=False)
class DenseReduction:
    """Settings of Horovod's own reduction.

    Attributes:
        op: Horovod's operation.
        compression: Horovod's compressor, or one of the user's with ``compress``, ``decompress``.
        predivide: ``gradient_predivide_factor``: with an average the part of the division that is
            done before the sum is ``1 / predivide``.
    """

    op: Any
    compression: Any
    predivide: float = 1.0

    @property
    def scale(self) -> dict[str, float]:
        """Horovod's arguments for the division before and after the sum."""
        if self.predivide == 1.0:
            return {}
        return {"prescale_factor": 1.0 / self.predivide, "postscale_factor": self.predivide}

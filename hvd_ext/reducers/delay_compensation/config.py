"""Settings of delay-compensated synchronous SGD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hvd_ext import checks


def check_rule(lam: Any, adaptive: Any, decay: Any, eps: Any) -> None:
    """Refuse a strength of compensation outside its limits; the settings of each kind of it explain them.

    Raises:
        TypeError, ValueError: a setting is of the wrong type or outside its limits.
    """
    checks.check_float("lam", lam, low=0, hint="lam=0 is the plain average, lam=2 the paper's")
    checks.check_bool("adaptive", adaptive)
    checks.check_float("decay", decay, low=0, high=1, open_high=True,
                       hint="0 forgets at once, 0.95 is the paper's setting on CIFAR-10")
    checks.check_float("eps", eps, low=0, open_low=True, hint="the paper's is 1e-7")


@dataclass(frozen=True)
class DelayCompensated:
    """Large-batch synchronous SGD whose gradients are compensated as if applied one after another.

    Pass it as ``op=``. The M ranks' gradients ``g^j``, all taken at ``w_t``, are ordered by the
    length of the step each would make, then reduced to
    ``(1/M) sum_j (g^j + lam g^j*g^j*(w~_j - w_t))`` where ``w~_{j+1} = w~_j - (lr/M) (...)``
    (DC-ASGD supplement, section H, eq. 93-95), so that plain SGD lands on ``w~_M``.

    Args:
        lam: strength of the compensation, >= 0; 0 is the plain average. With ``adaptive`` it is
            lam0 of the rule below (the paper uses 2 on CIFAR-10), otherwise the constant itself
            (the paper's DC-ASGD-c uses 0.04).
        adaptive: divide ``lam`` elementwise by ``sqrt(MeanSquare + eps)`` with
            ``MeanSquare <- decay MeanSquare + (1 - decay) g*g`` updated worker by worker.
        decay: memory of MeanSquare, in [0, 1). The paper: 0.95 on CIFAR-10, 0 on ImageNet.
        eps: added to MeanSquare under the root, > 0.
        order: "norm" applies short steps first, ties by rank; "rank" keeps the ranks' order.
        displacement: "cumulative" compensates for all gradients applied before; "local" for each
            rank's own step only (the other reading of section H; needs no order).
        virtual_workers: "rank" makes each rank one worker; "microbatch" makes each of its
            ``backward_passes_per_step`` micro-batches one, so that a single process with 16
            micro-batches is M = 16. Divide the loss by ``backward_passes_per_step`` as usual.

    Raises:
        TypeError, ValueError: a setting is of the wrong type or outside its limits.
    """

    slot: ClassVar[str] = "op"
    label: ClassVar[str] = "delay"

    lam: float = 2.0
    adaptive: bool = field(default=True, kw_only=True)
    decay: float = field(default=0.95, kw_only=True)
    eps: float = field(default=1e-7, kw_only=True)
    order: str = field(default="norm", kw_only=True)
    displacement: str = field(default="cumulative", kw_only=True)
    virtual_workers: str = field(default="rank", kw_only=True)

    def __post_init__(self) -> None:
        check_rule(self.lam, self.adaptive, self.decay, self.eps)
        checks.check_choice("order", self.order, ("norm", "rank"))
        checks.check_choice("displacement", self.displacement, ("cumulative", "local"))
        checks.check_choice("virtual_workers", self.virtual_workers, ("rank", "microbatch"))

    @property
    def keeps_mean_square(self) -> bool:
        """Whether the rule keeps MeanSquare between steps."""
        return self.adaptive and self.lam > 0

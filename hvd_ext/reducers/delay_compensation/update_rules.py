"""What the parameter server does with a delayed gradient, as in-place NumPy kernels.

The server and the delay engine call the same functions, so that a recorded run can be replayed
exactly. Shapes: every array of one call has the shape of the weights (any shape, float32 or
float64); ``lr`` and ``momentum`` may be numbers or arrays that broadcast against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_ext import checks, kernels

Array = NDArray[Any]

RULES = ("asgd", "dc-asgd-c", "dc-asgd-a")
DEFAULT_LAM = {"asgd": 0.0, "dc-asgd-c": 0.04, "dc-asgd-a": 2.0}  # DC-ASGD section 6.1
BLOCK_NUMEL = 32_768  # elements: the arrays of one block stay in a core's second-level cache


@dataclass(frozen=True, kw_only=True)
class AsyncRule:
    """How a delayed gradient is corrected before it is applied (DC-ASGD eq. 10, Algorithm 2).

    Args:
        name: "asgd" (no correction), "dc-asgd-c" (constant lam) or "dc-asgd-a" (lam divided by
            the root of MeanSquare).
        lam: the strength of the correction, at least 0; by default 0.04 for "dc-asgd-c" and 2
            for "dc-asgd-a". With lam = 0 every rule is ASGD.
        decay: m of MeanSquare, in [0, 1); the paper uses 0.95 (CIFAR-10) and 0 (ImageNet).
        eps: added to MeanSquare under the root, above 0.

    Raises:
        ValueError: a setting is out of range.
    """

    name: str = "dc-asgd-a"
    lam: float | None = None
    decay: float = 0.95
    eps: float = 1e-7

    def __post_init__(self) -> None:
        checks.check_choice("rule", self.name, RULES)
        default = DEFAULT_LAM[self.name]
        lam = default if self.lam is None else checks.check_float(
            "lam", self.lam, low=0.0, hint=f"the paper's value for {self.name} is {default:g}"
        )
        if self.name == "asgd" and lam != 0.0:
            raise ValueError(
                f'lam must be 0 for rule "asgd", got {lam:g}; for a constant lam use '
                'rule="dc-asgd-c", for an adaptive one rule="dc-asgd-a"'
            )
        object.__setattr__(self, "lam", lam)
        checks.check_float("decay", self.decay, low=0.0, high=1.0, open_high=True,
                           hint="the paper uses 0.95 (CIFAR-10) and 0 (ImageNet)")
        checks.check_float("eps", self.eps, low=0.0, open_low=True, hint="the paper uses 1e-7")

    @property
    def compensates(self) -> bool:
        """Whether the weights at which a gradient was taken are needed to apply it."""
        return self.lam != 0.0

    @property
    def adaptive(self) -> bool:
        """Whether a MeanSquare is kept."""
        return self.compensates and self.name == "dc-asgd-a"

    def largest_gradient(self, dtype: Any) -> float:
        """The magnitude from which an entry of a gradient would overflow the rule in ``dtype``."""
        largest = float(np.finfo(dtype).max)
        return largest**0.5 if self.compensates else largest


def apply_update(rule: AsyncRule, w: Array, gradient: Array, *, lr: Any, momentum: Any = 0.0,
                 w_bak: Array | None = None, mean_square: Array | None = None,
                 velocity: Array | None = None, work: tuple[Array, Array]) -> None:
    """One update of ``w`` in place; ``mean_square`` and ``velocity`` are updated with it.

    Args:
        rule: the settings.
        w: the current weights.
        gradient: taken at ``w_bak``; left as it is.
        lr: the learning rate.
        momentum: mu of Async-MSGD eq. 1.3; unused without ``velocity``.
        w_bak: the weights the gradient was taken at; needed when ``rule.compensates``.
        mean_square: MeanSquare; needed when ``rule.adaptive``.
        velocity: ``w_k - w_(k-1)``; None for no momentum.
        work: two arrays of w's shape and dtype, overwritten.
    """
    step, extra = work
    if rule.compensates:
        assert w_bak is not None
        np.multiply(gradient, gradient, out=extra)
        np.subtract(w, w_bak, out=step)
        step *= extra
        if rule.adaptive:
            assert mean_square is not None
            # DC-ASGD section 6: MeanSquare(t) = m MeanSquare(t-1) + (1 - m) g(w_t)^2
            extra *= 1.0 - rule.decay
            mean_square *= rule.decay
            mean_square += extra
            np.add(mean_square, rule.eps, out=extra)
            np.sqrt(extra, out=extra)
            step /= extra
        step *= rule.lam
        step += gradient  # DC-ASGD eq. 10
        step *= lr
    else:
        np.multiply(gradient, lr, out=step)
    if velocity is None:
        w -= step
    else:
        velocity *= momentum
        velocity -= step
        w += velocity  # Async-MSGD eq. 1.3


def apply_in_blocks(rule: AsyncRule, w: Array, gradient: Array, *, lr: float, momentum: float,
                    w_bak: Array, mean_square: Array | None, velocity: Array | None,
                    work: tuple[Array, Array]) -> None:
    """:func:`apply_update` on flat arrays (n,), then ``w_bak`` is overwritten with the new weights.

    It goes block by block, or through a compiled kernel where there is one, so that each array passes
    through memory once; the result is the same bit for bit, since every operation is elementwise and
    rounded by itself. ``work``: two arrays of (BLOCK,).
    """
    if kernels.kernels_usable() and _fits_kernel(w, gradient, w_bak, mean_square, velocity):
        _update_block(rule, w, gradient, w_bak, mean_square, velocity, lr, momentum)
        return
    for start in range(0, w.size, BLOCK_NUMEL):
        part = slice(start, min(start + BLOCK_NUMEL, w.size))
        size = part.stop - start
        apply_update(
            rule, w[part], gradient[part], lr=lr, momentum=momentum, w_bak=w_bak[part],
            mean_square=None if mean_square is None else mean_square[part],
            velocity=None if velocity is None else velocity[part],
            work=(work[0][:size], work[1][:size]),
        )
        w_bak[part] = w[part]


def compile_kernel(dtype: Any) -> None:
    """Have the kernel of :func:`apply_in_blocks` compiled, so that no update waits for it."""
    if kernels.kernels_usable():
        none = np.empty(0, dtype)
        _update_block(AsyncRule(), none, none, none, none, none, 0.0, 0.0)


def _fits_kernel(w: Array, *others: Array | None) -> bool:
    return w.dtype in (np.float32, np.float64) and w.flags.c_contiguous and all(
        one is None or (one.dtype == w.dtype and one.flags.c_contiguous) for one in others)


def _update_block(rule: AsyncRule, w: Array, gradient: Array, w_bak: Array, mean_square: Array | None,
                  velocity: Array | None, lr: float, momentum: float) -> None:
    from hvd_ext.kernels.rules import update_weights

    scalar = w.dtype.type
    update_weights(w, gradient, w_bak, w if mean_square is None else mean_square,
                   w if velocity is None else velocity,
                   compensates=rule.compensates, adaptive=rule.adaptive, moves=velocity is not None,
                   lr=scalar(lr),
                   momentum=scalar(momentum), lam=scalar(rule.lam), decay=scalar(rule.decay),
                   fresh=scalar(1.0 - rule.decay), eps=scalar(rule.eps))

"""Momentum and delay: how much momentum a measured delay allows (Async-MSGD, section 3)."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from hvd_ext import checks


def momentum_for_delay(delay: float, *, momentum: float = 0.9,
                       reference_delay: float = 1.0) -> float:
    """Compute the momentum for a delay from one pair that is known to work.

    Async-MSGD shows that the delay may grow as ``(1 - mu)^2 / sqrt(lr)``. With the constant taken
    from a pair (mu_0 at tau_0) that is known to work at this learning rate,
    ``1 - mu = (1 - mu_0) * sqrt(tau / tau_0)``, held in [0, mu_0]. The bound is asymptotic (lr to
    0): treat the result as a starting point, not as a guarantee.

    Args:
        delay: tau, in updates, at least 0.
        momentum: mu_0 in [0, 1), known to work at ``reference_delay``.
        reference_delay: tau_0 in updates, above 0.

    Returns:
        mu in [0, mu_0].

    Raises:
        ValueError: an argument is out of range.
    """
    delay = checks.check_float("delay", delay, low=0.0, hint="it counts updates")
    mu0 = checks.check_float("momentum", momentum, low=0.0, high=1.0, open_high=True,
                             hint="pass a momentum known to work, such as 0.9")
    tau0 = checks.check_float("reference_delay", reference_delay, low=0.0, open_low=True,
                              hint="pass the delay, in updates, at which that momentum worked")
    return min(mu0, max(0.0, 1.0 - (1.0 - mu0) * math.sqrt(delay / tau0)))


class AutoMomentum:
    """Holds the momentum under the bound from the largest of the last ``window`` delays.

    The momentum of an update follows from the delays up to and including its own, so a recorded
    run replays exactly.

    Args:
        momentum: mu_0 in [0, 1), known to work at ``reference_delay``, and the most that is used.
        reference_delay: tau_0 in updates, above 0.
        window: how many delays are looked back at.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, *, momentum: float = 0.9, reference_delay: float = 1.0,
                 window: int = 100) -> None:
        momentum_for_delay(0.0, momentum=momentum, reference_delay=reference_delay)
        self.momentum = float(momentum)
        self.reference_delay = float(reference_delay)
        self.window = checks.check_int("window", window, low=1, high=2**31 - 1)
        self._recent: deque[int] = deque(maxlen=self.window)

    def next_momentum(self, delay: int) -> float:
        """Takes note of a delay and returns the momentum for its update."""
        self._recent.append(int(delay))
        return momentum_for_delay(max(self._recent), momentum=self.momentum,
                                  reference_delay=self.reference_delay)

    def fresh_copy(self) -> AutoMomentum:
        """The same rule with no delay seen yet."""
        return AutoMomentum(momentum=self.momentum, reference_delay=self.reference_delay,
                            window=self.window)

    def state_dict(self) -> dict[str, Any]:
        """The delays in the window, oldest first."""
        return {"recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` returned."""
        self._recent = deque((int(delay) for delay in state["recent"]), maxlen=self.window)

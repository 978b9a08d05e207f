"""Ranks that run out of batches at different times: what their gradients weigh in the mean.

Every rank adds ``[active, samples]`` to one small sum a step. ``M`` below is the number of ranks, and the
reducers divide by it; these factors turn their mean into the one that was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvd_ext import checks

WEIGHTS = ("ranks", "active", "samples")
JOIN = ("hvd.join() knows allreduce only, and {what} uses other collectives too: the ranks that go on would "
        "wait for this one; put the loop over the batches into `with hvd.uneven(optimizer):` instead")
LATE = ("hvd.uneven cannot be combined with late=: a gradient would be weighed by another step's samples; "
        "give all ranks as many batches, or drop late=")


@dataclass(frozen=True)
class Weighing:
    """How the ranks' gradients are weighed.

    Attributes:
        by: "ranks": the mean over all M ranks, those without a batch count as zeros. "active": over the
            ranks that have a batch. "samples": by the number of samples of each rank's batch.
        ranks: M.
    """

    by: str
    ranks: int

    def before(self, samples: float, total: float) -> float:
        """What this rank's gradient is multiplied by before it is sent: ``M n_i / sum n``."""
        return self.ranks * samples / total if self.by == "samples" and total > 0 else 1.0

    def after(self, active: int) -> float:
        """What the mean over M is multiplied by: ``M / active``."""
        return self.ranks / active if self.by == "active" and active > 0 else 1.0


def check(weigh: str, *, reduction: str, weighable: bool, whole: bool) -> str:
    """Refuse what cannot be weighed so.

    Args:
        weigh: the user's ``weigh=``.
        reduction: what the optimizer reduces with, for the message.
        weighable: the reduction is a mean, so that "active" has a meaning.
        whole: the reduction is linear in each rank's gradient, so that "samples" has one.

    Raises:
        ValueError: naming both and what to do.
    """
    checks.choice("weigh", weigh, WEIGHTS)
    if weigh != "ranks" and not weighable:
        raise ValueError(f"weigh={weigh!r} needs a mean over the ranks, and the optimizer has {reduction}; "
                         "use op=hvd.Average, or weigh='ranks'")
    if weigh == "samples" and not whole:
        raise ValueError(f"weigh='samples' and {reduction} cannot be combined: each rank's gradient is a "
                         "step of its own there; use weigh='active'")
    return weigh


def check_samples(samples: float, weigh: str) -> float:
    """The number of samples a rank says its batch has.

    Raises:
        TypeError, ValueError: it is not a number above 0, or nothing is weighed by samples.
    """
    if weigh != "samples":
        raise ValueError(f"samples() is of use with weigh='samples' only, got weigh={weigh!r}; say "
                         "hvd.uneven(optimizer, weigh='samples')")
    return checks.number("samples", samples, low=0.0, open_low=True, hint="a rank without a batch leaves "
                         "its loop instead")


def missing_samples() -> ValueError:
    """The error of a step that was not told its batch's size."""
    return ValueError("weigh='samples' needs the size of every batch: call samples(len(batch)) on what "
                      "`with hvd.uneven(...) as data` gives, before loss.backward()")

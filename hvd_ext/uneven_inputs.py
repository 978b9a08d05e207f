"""Ranks that run out of batches at different times: what their gradients weigh in the mean.

Every rank adds ``[active, samples]`` to one small sum a step. ``M`` below is the number of ranks, and the
reducers divide by it; these factors turn their mean into the one that was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hvd_ext import checks
from hvd_ext.consistency import checksum

WEIGHTS = ("ranks", "active", "samples")
OVERLAP_UNSUPPORTED_MSG = ("hvd.uneven_inputs cannot be combined with overlap=: a gradient would be weighed "
                           "by another "
                           "step's samples; "
                           "give all ranks as many batches, or drop overlap=")


@dataclass(frozen=True)
class GradientWeighting:
    """How the ranks' gradients are weighed.

    Attributes:
        by: "ranks": the mean over all M ranks, those without a batch count as zeros. "active": over the
            ranks that have a batch. "samples": by the number of samples of each rank's batch.
        ranks: M.
    """

    by: str
    ranks: int

    def local_factor(self, samples: float, total: float) -> float:
        """What this rank's gradient is multiplied by before it is sent: ``M n_i / sum n``."""
        return self.ranks * samples / total if self.by == "samples" and total > 0 else 1.0

    def global_factor(self, active: int) -> float:
        """What the mean over M is multiplied by: ``M / active``."""
        return self.ranks / active if self.by == "active" and active > 0 else 1.0


def check_weighting(average_over: str, *, reduction: str, weighable: bool, whole: bool) -> str:
    """Refuse what cannot be weighed so.

    Args:
        average_over: the user's ``average_over=``.
        reduction: what the optimizer reduces with, for the message.
        weighable: the reduction is a mean, so that "active" has a meaning.
        whole: the reduction is linear in each rank's gradient, so that "samples" has one.

    Raises:
        ValueError: naming both and what to do.
    """
    checks.check_choice("average_over", average_over, WEIGHTS)
    if average_over != "ranks" and not weighable:
        raise ValueError(f"average_over={average_over!r} needs a mean over the ranks, and the optimizer has "
                         f"{reduction}; "
                         "use op=hvd.Average, or average_over='ranks'")
    if average_over == "samples" and not whole:
        raise ValueError(f"average_over='samples' and {reduction} cannot be combined: each rank's gradient "
                         "is a "
                         "step of its own there; use average_over='active'")
    return average_over


def check_samples(samples: float, average_over: str) -> float:
    """The number of samples a rank says its batch has.

    Raises:
        TypeError, ValueError: it is not a number above 0, or nothing is weighed by samples.
    """
    if average_over != "samples":
        raise ValueError("samples() is of use with average_over='samples' only, got "
                         f"average_over={average_over!r}; say "
                         "hvd.uneven_inputs(optimizer, average_over='samples')")
    return checks.check_float("samples", samples, low=0.0, open_low=True,
                              hint="a rank without a batch leaves "
                              "its loop instead")


def missing_samples() -> ValueError:
    """The error of a step that was not told its batch's size."""
    return ValueError("average_over='samples' needs the size of every batch: call samples(len(batch)) on "
                      "what "
                      "`with hvd.uneven_inputs(...) as data` gives, before loss.backward()")


CODES = ("update", "abandon", "gather", "clip")


@dataclass(frozen=True)
class Attendance:
    """Who has a batch in a step.

    Attributes:
        active: how many ranks.
        samples: those of all their batches.
        root: the lowest of these ranks; None where there is none.
        alike: all ranks, also those without a batch, have the same optimizer settings.
        ranks: M.
    """

    active: int
    samples: float
    root: int | None
    alike: bool
    ranks: int

    @property
    def missing(self) -> bool:
        """Whether some rank has no batch and some rank has one."""
        return 0 < self.active < self.ranks

    @classmethod
    def from_sum(cls, total: npt.NDArray[np.float64], ranks: int) -> Attendance:
        """From the sum of all ranks' :func:`attendance_row`."""
        present = np.flatnonzero(total[2 + checksum.WORDS :])
        return cls(round(total[0]), float(total[1]), int(present[0]) if present.size else None,
                   _all_equal(total[2 : 2 + checksum.WORDS]), ranks)


def attendance_row(active: bool, samples: float, settings: int, rank: int,
                   ranks: int) -> npt.NDArray[np.float64]:
    """What a rank adds to the sum before a step: (2 + WORDS + M,).

    Args:
        active: it has a batch.
        samples: of the batch.
        settings: a digest of the optimizer's settings.
    """
    present = np.zeros(ranks)
    present[rank] = active
    return np.concatenate([[active, samples], checksum.encode_checksum(settings), present])


@dataclass(frozen=True)
class Decision:
    """What ranks with a batch do with reduced gradients.

    Attributes:
        code: one of ``CODES``.
        touched: the loop may have changed the gradients.
        max_norm, norm_type: of "clip".
        alike: as in :class:`Attendance`.
    """

    code: str
    touched: bool = False
    max_norm: float = 0.0
    norm_type: float = 0.0
    alike: bool = True

    def encode_row(self, settings: int, *, root: bool) -> npt.NDArray[np.float64]:
        """What a rank with a batch adds to the sum; ``root`` for one of them."""
        counts = [float(self.code == code) for code in CODES]
        details = [self.touched, self.max_norm, self.norm_type] if root else [0.0, 0.0, 0.0]
        return np.concatenate([counts, details, checksum.encode_checksum(settings)])

    @staticmethod
    def empty_row(settings: int) -> npt.NDArray[np.float64]:
        """What a rank without a batch adds."""
        return np.concatenate([np.zeros(len(CODES) + 3), checksum.encode_checksum(settings)])

    @classmethod
    def from_sum(cls, total: npt.NDArray[np.float64], active: int) -> Decision:
        """From the sum of all rows.

        Raises:
            RuntimeError: on every rank, when ranks that have a batch did different things.
        """
        counts = total[: len(CODES)]
        chosen = int(np.argmax(counts))
        if round(counts[chosen]) != active:
            found = {code: round(count) for code, count in zip(CODES, counts, strict=True) if count}
            raise RuntimeError(
                "inside hvd.uneven_inputs the ranks that have a batch treated reduced gradients differently: "
                f"{found} (number of ranks); the loop must clip, skip and step alike on all of them")
        touched, max_norm, norm_type = total[len(CODES) : len(CODES) + 3].tolist()
        return cls(CODES[chosen], bool(touched), max_norm, norm_type, _all_equal(total[len(CODES) + 3 :]))


def _all_equal(words: npt.NDArray[np.float64]) -> bool:
    return checksum.all_equal(words.astype(np.int64))

"""Sparse allreduce planning: index ranges per owner, reply size, and the shared threshold.

Entries go to the owner of their index range; owners send back the large entries of what they sum up.
What is decided here needs a few numbers from each owner, which all ranks exchange.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hvd_ext.reducers.buckets import slice_sizes
from hvd_ext.reducers.topk.wire import HEADER_WORDS, Layout, MessageError

POINTS = 64  # magnitudes that an owner tells of its part
COUNT_BINS = 32  # counts of received entries that it tells, each of an equal stretch of its range
WORDS = 1 + POINTS + COUNT_BINS
MAX_SHARE_RATIO = 4.0  # times its even share that one owner may send back
UNEVEN = 1.4  # times the mean that one owner may receive before ranges are cut anew
LONGEST_WAIT = 128  # steps from one cut to the next

Bounds = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


def even_bounds(numel: int, ranks: int) -> Bounds:
    """Ranges of equal length: rank s owns positions ``bounds[s]`` up to ``bounds[s + 1]``; (M + 1,)."""
    return np.cumsum([0, *slice_sizes(numel, ranks)], dtype=np.int64)


def max_reply(k_out: int, ranks: int, length: int) -> int:
    """Most entries that the owner of ``length`` positions sends back, of about ``k_out`` in all."""
    return min(length, math.ceil(MAX_SHARE_RATIO * k_out / ranks))


def reported_ranks(most: int) -> npt.NDArray[np.int64]:
    """Of which of its ``most`` largest entries an owner tells the magnitude: (POINTS,) rising from 1.

    A constant factor apart, so that the number of entries above any magnitude is known to a few percent.
    """
    return np.round(np.geomspace(1, max(1, most), POINTS)).astype(np.int64)


def encode_report(most: int, magnitudes: npt.NDArray[np.floating], counts: Sequence[int]) -> Numbers:
    """What an owner tells of one bucket: (WORDS,).

    Args:
        most: entries that it could send back.
        magnitudes: those of ``reported_ranks(most)``, falling; of any length where ``most`` is 0.
        counts: entries that it received in each of ``COUNT_BINS`` stretches of its range.
    """
    row = np.zeros(WORDS)
    row[0] = most
    if most:
        row[1 : 1 + POINTS] = magnitudes
    row[1 + POINTS :] = counts
    return row


def shared_threshold(rows: Numbers, k_out: int) -> float:
    """The magnitude above which all owners together have about ``k_out`` entries; 0 for all of them.

    Args:
        rows: (M, WORDS), as :func:`encode_report` makes them.
    """
    most = rows[:, 0].astype(np.int64)
    if int(most.sum()) <= k_out:
        return 0.0
    tables = {int(one): np.diff(reported_ranks(int(one)), prepend=0) for one in set(most.tolist()) if one}
    weights = np.array([tables[int(one)] if one else np.zeros(POINTS) for one in most], np.float64)
    magnitudes = rows[:, 1 : 1 + POINTS]
    # Entries between two magnitudes count half at each: what is above any magnitude is then right on
    # average. The first is one entry at its own magnitude.
    half = weights / 2
    half[:, 0] = weights[:, 0]
    at = half.copy()
    at[:, 1:-1] += half[:, 2:]
    at[:, 0] += half[:, 1]
    order = np.argsort(-magnitudes, axis=None, kind="stable")
    above = np.cumsum(at.ravel()[order])
    last = int(np.searchsorted(above, k_out))
    return float(magnitudes.ravel()[order][min(last, len(order) - 1)])


def count_bins(bounds: Bounds) -> Bounds:
    """The edges of the stretches that each owner counts entries in: (M, CELLS + 1)."""
    steps = np.arange(COUNT_BINS + 1, dtype=np.int64)
    return bounds[:-1, None] + (np.diff(bounds)[:, None] * steps) // COUNT_BINS


def received_counts(rows: Numbers) -> Numbers:
    """How many entries each owner received: (M,)."""
    counts: Numbers = rows[:, 1 + POINTS :].sum(axis=1)
    return counts


def measure_imbalance(rows: Numbers) -> float:
    """What the fullest owner received, relative to the mean; 1 where nobody received anything."""
    counts = received_counts(rows)
    return float(counts.max() / counts.mean()) if counts.any() else 1.0


def needs_rebalance(rows: Numbers) -> bool:
    """Whether some owner received so much more than the mean that it is no accident of small numbers."""
    counts = received_counts(rows)
    return bool(counts.max() > UNEVEN * counts.mean() + 3 * math.sqrt(counts.mean()))


def rebalance(bounds: Bounds, rows: Numbers) -> Bounds:
    """Ranges of which each would have received as many entries: (M + 1,)."""
    counts = rows[:, 1 + POINTS :].ravel()
    if not counts.any():
        return bounds
    edges = np.append(count_bins(bounds)[:, :-1].ravel(), bounds[-1])
    so_far = np.concatenate([[0.0], np.cumsum(counts)])
    wanted = so_far[-1] * np.arange(1, len(bounds) - 1) / (len(bounds) - 1)
    # Nothing was received in an empty stretch: leave those out, so that places rise with counts.
    rising = np.flatnonzero(np.diff(so_far, prepend=-1.0))
    places = np.floor(np.interp(wanted, so_far[rising], edges[rising])).astype(np.int64)
    return np.concatenate([bounds[:1], np.maximum.accumulate(places), bounds[-1:]])


@dataclass
class OwnerRanges:
    """Who owns which positions of a bucket, and when that may change again.

    Attributes:
        bounds: (M + 1,), rank s owns ``bounds[s]`` up to ``bounds[s + 1]``.
        age: steps taken with them.
        wait: steps before they may change; doubled by each change.
    """

    bounds: Bounds
    age: int = 0
    wait: int = 1

    @property
    def ranks(self) -> int:
        """M."""
        return len(self.bounds) - 1

    def bounds_of(self, rank: int) -> tuple[int, int]:
        """The first position of a rank and the one behind its last."""
        return int(self.bounds[rank]), int(self.bounds[rank + 1])

    def next_ranges(self, rows: Numbers) -> OwnerRanges:
        """The ranges of the next step: these, or others where they proved uneven."""
        if self.age + 1 < self.wait or not needs_rebalance(rows):
            return OwnerRanges(self.bounds, self.age + 1, self.wait)
        return OwnerRanges(rebalance(self.bounds, rows), 0, min(2 * self.wait, LONGEST_WAIT))


def message_layouts(words: npt.NDArray[np.int32], values: str, messages: int,
                    what: str) -> Iterator[tuple[int, Layout]]:
    """Where each of several messages of their own lengths begins, and its layout.

    Args:
        words: all messages, one after another.
        values: type of the values.
        messages: how many there must be.
        what: the bucket's name, for the error.

    Raises:
        MessageError: they are not so many whole messages.
    """
    at, end = 0, len(words)
    for number in range(messages):
        count = int(words[at]) if at + HEADER_WORDS <= end else -1
        layout = Layout(max(count, 0), values)
        if count < 0 or at + layout.words > end or int(words[at + 1]) != count:
            raise MessageError(f"{what}: message {number} of {messages} is cut short or of another "
                               "kind; give all ranks the same model and the same TopK settings")
        yield at, layout
        at += layout.words
    if at != end:
        raise MessageError(f"{what}: {end - at} words are left over after {messages} messages; give "
                           "all ranks the same model and the same TopK settings")

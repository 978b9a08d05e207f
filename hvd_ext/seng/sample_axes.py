"""Where a layer's samples are: which axis, or which rows, of its input belong to which sample.

The gradients of single samples are what SENG's U is made of, so a layer that sees batch and time in
one axis, windows of images, or time before batch must be told apart from one with the samples
first. What a layer does is found by permuting the samples of the model's input and looking at how
the layer's input changes (:func:`recognize_placement`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_ext import checks

CONTIGUOUS = "contiguous"  # axis 0 holds the rows of sample 0, then those of sample 1, ...
STRIDED = "strided"        # axis 0 holds row 0 of every sample, then row 1 of every sample, ...
ROWS = "rows"              # which rows belong to a sample is not known: each counts as one
CONSTANT = "constant"      # the input is the same whatever the samples are

Index = npt.NDArray[np.int64]
RowsToSamples = Callable[[int], Any]
Placement = int | str | RowsToSamples
"""An axis, one of the words above, or a function from the number of rows to each row's sample."""


def check_samples(samples: Any) -> None:
    """Refuse a ``samples=`` that says nothing.

    Raises:
        TypeError: it, or what it holds for a module, is of the wrong kind.
        ValueError: a negative axis or an unknown word.
    """
    if samples is None:
        return
    if not isinstance(samples, Mapping):
        checks.check_int("samples", samples, low=0,
                         hint="the axis of the samples in the model's input, or a dict from names of modules")
        return
    for name, placement in samples.items():
        if not isinstance(name, str):
            raise TypeError(f"samples must have names of modules as keys, got {name!r}")
        if callable(placement):
            continue
        if isinstance(placement, str):
            checks.check_choice(f"samples[{name!r}]", placement, (CONTIGUOUS, STRIDED, ROWS),
                                hint="or an axis, or a function from the number of rows to each row's sample")
        else:
            checks.check_int(f"samples[{name!r}]", placement, low=0, hint="the axis of the samples")


def describe_samples(samples: Any) -> Any:
    """``samples`` in a form that ranks can compare: a function is shown as such."""
    if not isinstance(samples, Mapping):
        return samples
    return {name: "<function>" if callable(one) else one for name, one in sorted(samples.items())}


def describe_placement(placement: Placement) -> str:
    """A placement in a word, for a report."""
    if callable(placement):
        return "function"
    return f"axis {placement}" if isinstance(placement, int) else placement


def chosen_for(name: str, samples: Mapping[str, Placement]) -> Placement | None:
    """What ``samples`` says of a module: of the longest name that is it or a module around it."""
    around = [one for one in samples if one in ("", name) or name.startswith(f"{one}.")]
    return samples[max(around, key=len)] if around else None


def is_plain(shape: Sequence[int], batch: int, axis: int = 0) -> bool:
    """Whether an input of this shape has the samples on ``axis`` beyond doubt."""
    return [k for k, size in enumerate(shape) if size == batch] == [axis]


def shuffled_order(batch: int) -> Index:
    """An order of the samples in which none is at its own place."""
    cycle = np.random.default_rng(0).permutation(batch)
    order = np.empty(batch, np.int64)
    order[cycle] = np.roll(cycle, 1)
    return order


@dataclass(frozen=True)
class Signature:
    """An input reduced to one number per row: ``axes[a]`` (size of axis a,) for axis 0 and for
    each axis as long as the batch. ``rounding`` is how far equal rows may be apart."""

    axes: Mapping[int, npt.NDArray[np.float64]]
    rounding: float


def recognize_placement(before: Signature, after: Signature, batch: int, first: int = 0) -> Placement:
    """Where the samples are in an input that was ``before`` and is ``after`` :func:`shuffled_order`.

    The first that holds of: axis ``first``, each other axis, groups of contiguous rows, of strided
    ones; else :data:`CONSTANT` when nothing changed, else :data:`ROWS`.
    """
    if before.axes[0].size == 0 or after.axes[0].size == 0:  # an expert that got no token
        return ROWS
    order = shuffled_order(batch)
    axes = [a for a in before.axes if before.axes[a].size == batch]
    tried: list[tuple[Placement, Callable[[npt.NDArray[Any]], npt.NDArray[Any]], int]] = [
        (a, lambda rows: rows[order], a) for a in sorted(axes, key=lambda a: (a != first, a))]
    if before.axes[0].size > batch and before.axes[0].size % batch == 0:
        tried += [(CONTIGUOUS, lambda rows: rows.reshape(batch, -1)[order].ravel(), 0),
                  (STRIDED, lambda rows: rows.reshape(-1, batch)[:, order].ravel(), 0)]
    for placement, moved, axis in tried:
        one, other = before.axes[axis], after.axes[axis]
        if one.size != other.size:
            continue
        wanted = moved(one)
        # One part in a hundred of what the move changes: rows that are alike tell nothing.
        allowed = before.rounding + 0.01 * float(np.abs(wanted - one).max())
        if float(np.abs(other - wanted).max()) <= allowed:
            return placement
    one, other = before.axes[0], after.axes[0]
    same = one.size == other.size and float(np.abs(one - other).max()) <= before.rounding
    return CONSTANT if same else ROWS


def common_placement(found: Sequence[Placement]) -> Placement:
    """What holds for all uses of a module: their placement when it is the same one, else rows."""
    return found[0] if all(one == found[0] for one in found) else ROWS


def choose_placement(shapes: Sequence[Sequence[int]], before: Sequence[Signature], after: Sequence[Signature],
                     batch: int, first: int = 0) -> Placement:
    """Where a module has its samples, from all that is known of its inputs.

    Args:
        shapes: of the inputs of a pass of ``batch`` samples.
        before, after: the inputs in the two passes of a probe; empty where there was none.
    """
    if before and len(before) == len(after):
        return common_placement([recognize_placement(one, other, batch, first)
                                 for one, other in zip(before, after, strict=True)])
    return first if all(is_plain(shape, batch, first) for shape in shapes) else ROWS


def several_rows(placement: Placement | None) -> bool:
    """Whether a sample has several rows of axis 0."""
    return callable(placement) or placement in (CONTIGUOUS, STRIDED)


def rows_of(placement: Placement, rows: int, batch: int | None) -> Index | None:
    """Which rows of axis 0 each sample has, (samples, most rows of one), -1 where it has fewer.

    None: a row is a sample. Of a batch of one all rows are the sample's.

    Raises:
        ValueError: the placement does not fit so many rows.
    """
    if callable(placement):
        sample = np.asarray(placement(rows))
        if sample.shape != (rows,) or sample.dtype.kind not in "iu" or (rows and sample.min() < 0):
            raise ValueError(f"the function in samples= must give {rows} sample numbers for {rows} rows, "
                             f"got shape {sample.shape}, {sample.dtype}")
        counts = np.bincount(sample)
        index = np.full((counts.size, int(counts.max())), -1, np.int64)
        by_sample = np.argsort(sample, kind="stable")
        place = np.arange(rows) - np.repeat(np.cumsum(counts) - counts, counts)
        index[sample[by_sample], place] = by_sample
        return index
    if isinstance(placement, int) or placement == ROWS:
        return None
    if batch is None:
        raise ValueError("the batch size is not known; call the model that SENG was given, not its "
                         "parts, or give samples= a function")
    if rows % batch:
        raise ValueError(f"its {rows} rows are no multiple of the batch of {batch}")
    if rows == batch:
        return None
    numbers = np.arange(rows, dtype=np.int64)
    return numbers.reshape(batch, -1) if placement == CONTIGUOUS else numbers.reshape(-1, batch).T

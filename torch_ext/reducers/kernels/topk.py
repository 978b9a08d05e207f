"""What TopK computes on tensors: choose, round, pack, unpack, add up. No collectives, no state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hvd_ext.consistency.fingerprint import digest_parts
from hvd_ext.reducers.topk import Layout, TopK
from hvd_ext.reducers.topk.plan import Segment
from hvd_ext.reducers.topk.selection import SAMPLE, has_enough_candidates, sample_ranks
from hvd_ext.reducers.topk.wire import HEADER_WORDS
from hvd_ext.torch import kernels

CHUNK_NUMEL = 2**18  # elements that stay in a core's cache while they are compared


def select_entries(flat: torch.Tensor, segments: Sequence[Segment], config: TopK,
                   seed: tuple[int, ...]) -> torch.Tensor:
    """Positions of the entries to send (SPARS-AMS Algorithm 1, line 7).

    Args:
        flat: n finite numbers, float32 or float64.
        segments: of each, the ``k`` largest by magnitude are chosen; equals by lowest position;
            zeros never. ``config.selection == "sampled"`` may stay up to ``tolerance * k`` below k.
        config: the method's settings.
        seed: numbers that tell this draw from others; an exact selection does not depend on it.

    Returns:
        int64 positions in ``flat``, rising.
    """
    if not segments:
        return torch.empty(0, dtype=torch.int64, device=flat.device)
    chosen = []
    for number, segment in enumerate(segments):
        piece = flat[segment.offset : segment.offset + segment.numel]
        positions = _select_one(piece, segment.k, config, (*seed, number))
        chosen.append(positions + segment.offset if segment.offset else positions)
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


def _select_one(piece: torch.Tensor, k: int, config: TopK, seed: tuple[int, ...]) -> torch.Tensor:
    ranks = sample_ranks(piece.numel(), k, config.selection)
    if ranks:
        sample = torch.topk(_sample_magnitudes(piece, seed), ranks[-1]).values.tolist()
        for rank in ranks:
            threshold = sample[rank - 1]
            found, magnitudes = kernels.find_above(piece, threshold, 2 * k) or _find_above(piece, threshold)
            if found.numel() > k:
                return found[select_largest(magnitudes, k)]
            # A threshold of zero leaves out nothing that may be chosen.
            if threshold == 0 or has_enough_candidates(found.numel(), k, config.selection, config.tolerance):
                return found
    return select_largest(piece.abs(), k)


def select_largest(magnitudes: torch.Tensor, k: int) -> torch.Tensor:
    """Rising positions of the ``k`` largest, equals by lowest position, zeros never."""
    if k >= magnitudes.numel():
        return _set_positions(magnitudes > 0)
    least = _largest_but(magnitudes, k - 1)
    keep = magnitudes > least
    if magnitudes.device.type != "cpu":
        return _set_positions(_with_equals(keep, magnitudes, least, k))
    if least > 0:
        equal = _set_positions(magnitudes == least)
        keep[equal[: k - int(keep.sum())]] = True
    return _set_positions(keep)


def _with_equals(keep: torch.Tensor, magnitudes: torch.Tensor, least: torch.Tensor, k: int) -> torch.Tensor:
    """``keep`` and the first that equal ``least``, if that is not zero, up to ``k``; nothing is read on
    the host, which would wait for the device."""
    equal = (magnitudes == least) & (least > 0)
    return keep | (equal & (equal.cumsum(0) <= k - keep.sum()))


def _largest_but(magnitudes: torch.Tensor, rank: int) -> torch.Tensor:
    """The largest but ``rank``; NumPy's search is the faster one on a CPU."""
    if magnitudes.device.type == "cpu":
        place = magnitudes.numel() - 1 - rank
        return torch.from_numpy(np.partition(magnitudes.numpy(), place))[place]
    return torch.topk(magnitudes, rank + 1, sorted=False).values.min()


def _sample_magnitudes(piece: torch.Tensor, seed: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(digest_parts(*seed))
    places = torch.randint(piece.numel(), (SAMPLE,), generator=generator)
    return piece[places.to(piece.device)].abs()


def _find_above(piece: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rising positions of magnitudes at or above the threshold, above it when it is zero, and these."""
    compare = torch.ge if threshold > 0 else torch.gt
    if piece.device.type != "cpu":
        found = _set_positions(compare(piece.abs(), threshold))
        return found, piece[found].abs()
    parts = []
    for start in range(0, piece.numel(), CHUNK_NUMEL):
        part = piece[start : start + CHUNK_NUMEL]
        parts.append(np.flatnonzero(compare(part.abs(), threshold).numpy()) + start)
    found = torch.from_numpy(np.concatenate(parts))
    return found, piece[found].abs()


def _set_positions(mask: torch.Tensor) -> torch.Tensor:
    """Rising positions where the mask is set; NumPy's search is the faster one for few of many."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().flatten()


def wire_dtype(config: TopK) -> torch.dtype:
    """The dtype of the values on the wire."""
    return getattr(torch, config.values)  # type: ignore[no-any-return]


def split_selected(flat: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Take the chosen entries out of ``flat`` = g + e, in place; what stays is the new e.

    What rounding to ``dtype`` takes away stays in ``flat`` too, so that ``flat`` after plus the
    result equals ``flat`` before, bit for bit (SPARS-AMS Algorithm 1, lines 7 and 8).

    Returns:
        The values to send, of ``dtype``, in the order of ``positions``; never infinite.
    """
    done = kernels.split_selected(flat, positions, dtype)
    if done is not None:
        return done
    exact = flat[positions]
    limit = min(torch.finfo(dtype).max, torch.finfo(flat.dtype).max)
    values = exact.clamp(-limit, limit).to(dtype)
    flat[positions] = exact - values.to(flat.dtype)
    return values


def pack_message(positions: torch.Tensor, values: torch.Tensor, layout: Layout) -> torch.Tensor:
    """One message: int32, of ``layout.words`` words."""
    count = positions.numel()
    words = torch.zeros(layout.words, dtype=torch.int32, device=values.device)
    words[0] = count
    words[1] = layout.k
    words[HEADER_WORDS : HEADER_WORDS + count] = positions
    words[layout.data].view(values.dtype)[:count] = values
    return words


def read_headers(messages: torch.Tensor, ranks: int) -> list[list[int]]:
    """Each rank's header, from messages in a row; (-1, -1) when they are not equally long."""
    if messages.numel() % ranks or messages.numel() < ranks * HEADER_WORDS:
        return [[-1, -1]] * ranks
    return messages.view(ranks, -1)[:, :HEADER_WORDS].tolist()


def add_up(messages: torch.Tensor, counts: Sequence[int], layout: Layout, dtype: torch.dtype,
           out: torch.Tensor) -> None:
    """Add every rank's entries to ``out``, rank by rank (SPARS-AMS Algorithm 1, line 12).

    A rank's positions are unique, so each addition is one scatter whose result does not depend on
    the order of its parts: all ranks, on CPU or GPU, get the same bits.
    """
    for count, words in zip(counts, messages.view(len(counts), -1), strict=True):
        positions, values = unpack_message(words, layout, dtype, count)
        out.index_add_(0, positions, values.to(out.dtype))


def unpack_message(words: torch.Tensor, layout: Layout, dtype: torch.dtype,
                   count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions, int32, and values of ``dtype`` of one message; the first ``count`` of its k entries."""
    count = layout.k if count is None else count
    return words[HEADER_WORDS : HEADER_WORDS + count], words[layout.data].view(dtype)[:count]

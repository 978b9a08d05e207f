"""What the sparse allreduce computes, in NumPy: few entries of many, whose number is known only now.

Values travel as their bits, so that float16 and bfloat16 need no arithmetic of their own here.
"""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hvd_ext.reducers.topk import Layout, allreduce
from hvd_ext.reducers.topk.wire import HEADER_WORDS, VALUE_BYTES

Array = npt.NDArray[Any]
BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def bytes_by_kind(values: str) -> dict[str, int]:
    """How the bytes of a message are shared between its kinds."""
    return {"indices": 4, "values": VALUE_BYTES[values]}


def wire_dtype(values: str) -> Any:
    """The NumPy dtype of the values on the wire."""
    return ml_dtypes.bfloat16 if values == "bfloat16" else np.dtype(values)


def pack_entries(places: Array, bits: Array, values: str) -> Array:
    """One message, int32 words, of entries at rising places."""
    layout = Layout(len(places), values)
    words = np.zeros(layout.words, np.int32)
    words[:HEADER_WORDS] = len(places)
    words[HEADER_WORDS : HEADER_WORDS + len(places)] = places
    words[layout.data].view(bits.dtype)[: len(bits)] = bits
    return words


def for_owners(bounds: allreduce.Bounds, message: Array, values: str) -> tuple[Array, Array]:
    """A message's entries as one message for each owner, one after another, and each one's words."""
    count, layout = int(message[0]), Layout(int(message[1]), values)
    places = message[HEADER_WORDS : HEADER_WORDS + count]
    bits = message[layout.data].view(BITS[VALUE_BYTES[values]])[:count]
    cuts = [0, *np.searchsorted(places, bounds[1:-1]).tolist(), len(places)]
    messages = [pack_entries(places[a:b], bits[a:b], values) for a, b in itertools.pairwise(cuts)]
    return np.concatenate(messages), np.array([len(one) for one in messages], np.int32)


def unpack_messages(words: Array, values: str, ranks: int, what: str) -> list[tuple[Array, Array]]:
    """Places and values of each rank's message."""
    dtype, found = wire_dtype(values), []
    for at, layout in allreduce.message_layouts(words, values, ranks, what):
        message = words[at : at + layout.words]
        found.append((message[HEADER_WORDS : HEADER_WORDS + layout.k],
                      message[layout.data].view(dtype)[: layout.k]))
    return found


def sum_up(messages: Array, residual: Array, low: int, edges: allreduce.Bounds, ranks: int, k_out: int,
           values: str, what: str) -> tuple[Array, Array, allreduce.Numbers]:
    """The mean over the ranks in an owner's range, with its residual; see ``sparse.row_of``.

    Args:
        residual: of the range.
        low: the first place of the range.
        edges: of the stretches in which received entries are counted.

    Returns:
        The means, places of the largest among them (int64, rising), and what the owner tells.
    """
    mean = np.zeros_like(residual)
    counts = np.zeros(allreduce.COUNT_BINS, np.int64)
    for places, sent in unpack_messages(messages, values, ranks, what):
        mean[places - low] += sent.astype(mean.dtype)  # places of one rank are unique
        counts += np.diff(np.searchsorted(places, edges))
    mean /= ranks
    mean += residual
    places = select_largest(np.abs(mean), allreduce.max_reply(k_out, ranks, len(mean)))
    falling = np.sort(np.abs(mean[places]))[::-1]
    told = falling[allreduce.reported_ranks(len(falling)) - 1] if len(falling) else falling
    return mean, places, allreduce.encode_report(len(falling), told, counts.tolist())


def select_largest(magnitudes: Array, k: int) -> Array:
    """Rising places of the ``k`` largest, equals by lowest place, zeros never; int64."""
    if k >= len(magnitudes):
        return np.flatnonzero(magnitudes > 0)
    if k == 0:
        return np.zeros(0, np.int64)
    least = np.partition(magnitudes, len(magnitudes) - k)[len(magnitudes) - k]
    above = np.flatnonzero(magnitudes > least)
    equal = np.flatnonzero(magnitudes == least)[: k - len(above)] if least > 0 else above[:0]
    return np.sort(np.concatenate([above, equal]))


def build_reply(mean: Array, places: Array, low: int, table: allreduce.Numbers, k_out: int,
                values: str) -> tuple[Array, Array]:
    """The message with what an owner sends to all, and what is left of its means."""
    least = allreduce.shared_threshold(table, k_out)
    chosen = places if least == 0 else places[np.abs(mean[places]) >= least]
    dtype = wire_dtype(values)
    limit = min(float(ml_dtypes.finfo(dtype).max), float(np.finfo(mean.dtype).max))
    sent = np.clip(mean[chosen], -limit, limit).astype(dtype)
    left = mean.copy()
    left[chosen] -= sent.astype(mean.dtype)
    return pack_entries(chosen + low, sent.view(BITS[VALUE_BYTES[values]]), values), left


def scatter_entries(words: Array, values: str, ranks: int, numel: int, dtype: Any,
                    what: str) -> tuple[Array, int]:
    """All owners' entries as a dense vector (numel,), and how many there are."""
    total, entries = np.zeros(numel, dtype), 0
    for places, sent in unpack_messages(words, values, ranks, what):
        total[places] = sent.astype(dtype)
        entries += len(places)
    return total, entries

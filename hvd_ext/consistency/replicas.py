"""Whether replicas are identical: what each rank says of its tensors, and where the ranks differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


class ReplicasDifferError(AssertionError):
    """Tensors that must be the same bits on every rank are not."""


@dataclass(frozen=True)
class Summary:
    """One tensor as its rank holds it; ``digest`` is equal only where every bit is."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    digest: str
    norm: float

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} with norm {self.norm:.9g}"


def summarize_array(name: str, array: np.ndarray[Any, Any]) -> Summary:
    """The summary of one array; NaNs and signed zeros count by their bits."""
    data = np.ascontiguousarray(array)
    digest = hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()
    try:
        norm = float(np.linalg.norm(data.astype(np.float64).reshape(-1)))
    except (TypeError, ValueError):
        norm = float("nan")
    return Summary(name, tuple(data.shape), str(data.dtype), digest, norm)


def check_replicas(by_rank: Sequence[Iterable[Summary]], *, limit: int = 5) -> None:
    """Compare the ranks' summaries with rank 0's.

    Args:
        by_rank: each rank's summaries, in the order of its model.
        limit: how many differing tensors the message names.

    Raises:
        ReplicasDifferError: they differ; names the first differing tensors and their ranks.
    """
    ranks = [{summary.name: summary for summary in summaries} for summaries in by_rank]
    names = list(ranks[0]) + [name for rank in ranks[1:] for name in rank if name not in ranks[0]]
    lines = []
    for name in dict.fromkeys(names):
        groups: dict[str, list[int]] = {}
        for number, rank in enumerate(ranks):
            found = rank.get(name)
            key = "missing" if found is None else f"{found} (digest {found.digest[:8]})"
            groups.setdefault(key, []).append(number)
        if len(groups) > 1:
            parts = [f"{text} on {_format_ranks(numbers)}" for text, numbers in groups.items()]
            lines.append(f"  {name}: " + "; ".join(parts))
    if not lines:
        return
    more = f"\n  and {len(lines) - limit} more" if len(lines) > limit else ""
    raise ReplicasDifferError(
        f"{len(lines)} of {len(dict.fromkeys(names))} tensors differ between ranks:\n"
        + "\n".join(lines[:limit]) + more
        + "\nBroadcast the model and the optimizer from one rank before the first step, and see "
        "that every step goes through hvd.DistributedOptimizer (or a distributed tape)")


def _format_ranks(numbers: Sequence[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))

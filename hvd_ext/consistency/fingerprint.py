"""What all ranks must have in common: one number to compare, and an error that says what differs.

Ranks exchange :attr:`Fingerprint.number` (a few bytes). Only when the numbers differ do they
exchange the lines behind them, so that every rank raises the same error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


def digest_parts(*parts: object) -> int:
    """A 62-bit number that is equal where the parts' ``repr`` is."""
    text = "\n".join(repr(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def describe_settings(settings: Any, *, leave_out: Sequence[str] = ()) -> list[str]:
    """A dataclass as lines ``name=value``, the same text on ranks that were given the same.

    A function is shown as ``<function>``: two of them cannot be compared.
    """
    lines = []
    for entry in fields(settings):
        if entry.name not in leave_out:
            value = getattr(settings, entry.name)
            opaque = callable(value) and not is_dataclass(value)
            lines.append(f"{entry.name}={'<function>' if opaque else repr(value)}")
    return lines


@dataclass(frozen=True)
class Fingerprint:
    """Lines of text that must be the same on every rank."""

    lines: tuple[str, ...]

    @property
    def number(self) -> int:
        """62 bits that ranks compare in place of the lines."""
        return digest_parts(self.lines)


def mismatched_ranks(values: Sequence[Any]) -> list[int]:
    """The ranks whose value differs from rank 0's."""
    return [rank for rank, value in enumerate(values) if value != values[0]]


def describe_mismatch(by_rank: Sequence[Sequence[str]], limit: int = 4) -> list[str]:
    """For each rank whose lines differ from rank 0's, a line that says how; a few items each."""
    first = list(by_rank[0])
    lines = []
    for rank in mismatched_ranks([list(one) for one in by_rank]):
        theirs = list(by_rank[rank])
        missing = [item for item in first if item not in set(theirs)]
        extra = [item for item in theirs if item not in set(first)]
        found = [f"does not have {item}" for item in missing[:limit]]
        found += [f"has {item}" for item in extra[:limit]]
        lines.append(f"rank {rank} " + "; ".join(found or ["has the same in another order"]))
    return lines


def mismatch_message(what: str, by_rank: Sequence[Sequence[str]], remedy: str) -> str:
    """The message of an error that every rank raises.

    Args:
        what: a clause such as "the ranks do not train the same parameters in the same way".
        by_rank: each rank's fingerprint lines.
        remedy: what to do, as a sentence.
    """
    return f"{what}; compared with rank 0, {'; '.join(describe_mismatch(by_rank))}. {remedy}"

"""Counts of bytes sent and received by kind, in total and since the last step."""

from collections import defaultdict
from collections.abc import Mapping


def by_kind(kind: str | Mapping[str, int], count: int) -> dict[str, int]:
    """``count`` bytes by kind, where ``kind`` says what one message consists of; they add up to ``count``."""
    if isinstance(kind, str):
        return {kind: count}
    whole = sum(kind.values())
    parts = {part: count * share // whole for part, share in kind.items()}
    last = next(reversed(parts))
    return {**parts, last: parts[last] + count - sum(parts.values())}


def allreduce_bytes(count: int, ranks: int) -> int:
    """What a rank sends, and what it receives, when ``count`` bytes are reduced around a ring."""
    return 2 * (ranks - 1) * count // ranks


class Traffic:
    """Adds up one rank's bytes by kind of message ("gradients", "values", "indices", "weights", ...)."""

    def __init__(self) -> None:
        self.sent: dict[str, int] = defaultdict(int)
        self.received: dict[str, int] = defaultdict(int)
        self._sent_before: dict[str, int] = {}
        self._received_before: dict[str, int] = {}
        self.last_sent: dict[str, int] = {}
        self.last_received: dict[str, int] = {}

    def count_bytes(self, kind: str, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes of one message."""
        self.sent[kind] += sent
        self.received[kind] += received

    def step(self, *, same: bool = False) -> None:
        """Close a step: ``last_sent`` and ``last_received`` become the bytes since the last call.

        With ``same`` these bytes are added to the step that was closed last.
        """
        sent = _counts_since(self.sent, self._sent_before)
        received = _counts_since(self.received, self._received_before)
        self.last_sent = _merge_counts(self.last_sent, sent) if same else sent
        self.last_received = _merge_counts(self.last_received, received) if same else received
        self._sent_before = dict(self.sent)
        self._received_before = dict(self.received)


def _merge_counts(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return {kind: first.get(kind, 0) + second.get(kind, 0) for kind in {**first, **second}}


def _counts_since(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {kind: count - before.get(kind, 0) for kind, count in now.items()
            if count != before.get(kind, 0)}

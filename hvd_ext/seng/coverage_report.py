"""How much of a model has curvature, and why the rest has none: the first line of a report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


def normalize_reason(reason: str) -> str:
    """A reason without what differs from case to case: numbers, and all from a bracket on."""
    return re.sub(r"\d+", "N", re.sub(r"\s*[\[(].*", "", reason)).strip()


@dataclass(frozen=True)
class UncoveredParameters:
    """``count`` parameters of a module or layer that have no curvature, and why."""

    name: str
    kind: str
    cause: str
    count: int

    @property
    def what(self) -> str:
        """Which, for a report."""
        return f"{self.name or 'model'}, {self.kind}"

    @property
    def text(self) -> str:
        """Which, for a sentence."""
        return f"{self.name or 'model'} ({self.kind})"


def group_by_reason(gaps: Sequence[UncoveredParameters]) -> dict[str, list[UncoveredParameters]]:
    """The gaps of each cause, causes with the most parameters first."""
    groups: dict[str, list[UncoveredParameters]] = {}
    for gap in gaps:
        groups.setdefault(normalize_reason(gap.cause), []).append(gap)
    return dict(sorted(groups.items(), key=lambda item: -sum(gap.count for gap in item[1])))


def coverage_line(total: int, gaps: Sequence[UncoveredParameters], other: str) -> str:
    """Which fraction of ``total`` parameters has a rule, and why the rest gets ``other``."""
    missing = sum(gap.count for gap in gaps)
    line = f"SENG has a rule for {format_percent(total - missing, total)} of {total:,} parameters"
    if not missing:
        return f"{line}."
    parts = []
    for cause, members in group_by_reason(gaps).items():
        count = sum(gap.count for gap in members)
        names = format_names([gap.what for gap in members])
        parts.append(f"{format_percent(count, total)} {cause} ({names})")
    return f"{line}; the rest gets {other}: {', '.join(parts)}."


def format_percent(part: int, whole: int) -> str:
    """``part`` of ``whole`` in percent; never 100 while something is missing."""
    if part == whole:
        return "100 %"
    return f"{min(100.0 * part / max(whole, 1), 99.9):.1f} %"


def format_names(names: Sequence[str], most: int = 4) -> str:
    """A few names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

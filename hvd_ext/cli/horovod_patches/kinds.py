"""The three kinds of edits: replacements in a file, a diff of a file, a whole file."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

FOLDER = Path(__file__).parent
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@")


class Edit(Protocol):
    """One file of Horovod's source before and after."""

    @property
    def path(self) -> str:
        """The file, relative to the source folder."""

    @property
    def before(self) -> str | None:
        """SHA-256 of the file as released; None for a file that the release lacks."""

    @property
    def after(self) -> str:
        """SHA-256 of the file as edited."""

    @property
    def why(self) -> str:
        """The reason."""

    def edit_text(self, text: str) -> str:
        """The edited text of the released ``text``."""


@dataclass(frozen=True)
class Patch:
    """Replacements in one file.

    Args:
        path: the file, relative to the source folder.
        before: SHA-256 of the file as released.
        after: SHA-256 of the file as edited.
        replacements: pairs (old, new).
        why: the reason, for the log.
        times: how often each ``old`` occurs.
    """

    path: str
    before: str
    after: str
    replacements: tuple[tuple[str, str], ...]
    why: str
    times: int = 1

    def edit_text(self, text: str) -> str:
        """Replace each ``old``, which must occur ``times`` times."""
        for old, new in self.replacements:
            if text.count(old) != self.times:
                raise AssertionError(f"{self.path}: {old!r} occurs {text.count(old)} times, not {self.times}")
            text = text.replace(old, new)
        return text


@dataclass(frozen=True)
class Diff:
    """A unified diff of one file, kept as ``diffs/<path>.diff`` beside this module.

    Args:
        path: the file, relative to the source folder.
        before: SHA-256 of the file as released.
        after: SHA-256 of the file as edited.
        why: the reason, for the log.
    """

    path: str
    before: str
    after: str
    why: str

    def edit_text(self, text: str) -> str:
        """Apply the diff; every line of context must be there."""
        diff = (FOLDER / "diffs" / f"{self.path}.diff").read_text()
        return apply_diff(text, diff.splitlines(keepends=True), self.path)


@dataclass(frozen=True)
class WholeFile:
    """A file that is added or replaced, kept as ``files/<path>.in`` beside this module.

    Args:
        path: the file, relative to the source folder.
        before: SHA-256 of the file as released; None for a new one.
        why: the reason, for the log.
    """

    path: str
    before: str | None
    why: str

    @property
    def after(self) -> str:
        """SHA-256 of the file."""
        return sha256(self._text().encode()).hexdigest()

    def edit_text(self, text: str) -> str:
        """The whole file; ``text`` is dropped."""
        return self._text()

    def _text(self) -> str:
        return (FOLDER / "files" / f"{self.path}.in").read_text()


def apply_diff(text: str, diff: Sequence[str], name: str) -> str:
    """``text`` with the hunks of a unified diff applied, at the lines that they name.

    Args:
        text: the released text.
        diff: the diff's lines.
        name: for the error.
    """
    lines, edited, position = text.splitlines(keepends=True), [], 0
    for row in itertools.dropwhile(lambda row: not _HUNK.match(row), diff):
        header = _HUNK.match(row)
        if header:
            start = int(header.group(1)) - (header.group(2) != "0")
            edited += lines[position:start]
            position = start
        elif row.startswith("+"):
            edited.append(row[1:])
        else:
            if lines[position] != row[1:]:
                raise AssertionError(f"{name}: line {position + 1} is {lines[position]!r}, not {row[1:]!r}")
            edited += [row[1:]] * row.startswith(" ")
            position += 1
    return "".join(edited + lines[position:])

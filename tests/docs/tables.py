"""Tables of README.md and docs/*.md: their cells, and the arguments and defaults that they name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.docs.blocks import PAGES, find_prose

NAMED = re.compile(r"`([^`]+)`")
SIZES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
REQUIRED = object()  # the default of an argument that has none


@dataclass(frozen=True)
class Table:
    """A table in the text.

    Args:
        page, line: where its head is.
        section: the nearest heading above it.
        head: the cells of its first row.
        rows: those of the others.
    """

    page: str
    line: int
    section: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def where(self) -> tuple[str, str]:
        """Page and heading."""
        return self.page, self.section

    @property
    def place(self) -> str:
        """``page:line``."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Argument:
    """What a table says of an argument: its default, and the front end that alone has it, if any."""

    name: str
    default: Any
    front_end: str | None


def find_tables(page: str) -> Iterator[Table]:
    """All tables of a page."""
    section, lines = "", [*find_prose(page).splitlines(), ""]
    number = 0
    while number < len(lines):
        if lines[number].startswith("#"):
            section = lines[number].lstrip("# ")
        if lines[number].startswith("|"):
            end = next(after for after in range(number, len(lines)) if not lines[after].startswith("|"))
            head, _, *rows = (_cells(line) for line in lines[number:end])
            yield Table(page, number + 1, section, head, tuple(rows))
            number = end
        number += 1


def _cells(line: str) -> tuple[str, ...]:
    parts = re.split(r"(?<!\\)\|", line.strip())
    return tuple(part.strip().replace("\\|", "|") for part in parts[1:-1])


TABLES = [table for page in PAGES for table in find_tables(page)]


def read_arguments(table: Table) -> list[Argument]:
    """The arguments of a table whose columns are argument, default and meaning.

    Raises:
        ValueError: a cell cannot be read; the message says which.
    """
    assert table.head[:2] == ("argument", "default"), f"{table.place} has no column of defaults"
    read = []
    for first, second, *_ in table.rows:
        names = NAMED.findall(first)
        front_end = next((name for name in ("torch", "tensorflow")
                          if {"torch": "PyTorch", "tensorflow": "TensorFlow"}[name] in first), None)
        defaults = [second] if len(names) == 1 else second.split(", ")
        if len(defaults) != len(names):
            raise ValueError(f"{table.place}: {first} and {second} are not as many")
        read += [Argument(name, _default(table, text), front_end)
                 for name, text in zip(names, defaults, strict=True)]
    return read


def _default(table: Table, text: str) -> Any:
    if text == "required":
        return REQUIRED
    size = re.search(r"(\d+) ([KMG]iB)$", text)
    if size:
        return int(size.group(1)) * SIZES[size.group(2)]
    if not re.fullmatch(r"`[^`]+`", text):
        raise ValueError(f"{table.place}: {text!r} is no `literal`, no size and not \"required\"")
    return ast.literal_eval(text.strip("`"))


def read_choices(table: Table) -> tuple[list[Any], list[Any]]:
    """The values of a table of choices, one a row, and those of them marked as the default."""
    values = [(ast.literal_eval(NAMED.findall(row[0])[0]), "(default)" in row[0]) for row in table.rows]
    return [value for value, _ in values], [value for value, default in values if default]

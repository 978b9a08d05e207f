"""Fenced code blocks of the pages, with where they stand and which front end they are for."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "SECURITY.md",
         *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^\s*```(\w*)\s*$")
FRONT_ENDS = {
    "torch": re.compile(r"\b(hvd_ext|horovod)\.torch\b|\btorch\."),
    "tensorflow": re.compile(r"\b(hvd_ext|horovod)\.(tensorflow|keras)\b|\b(keras|tf)\."),
}


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        page: path of the page from the root of the repository.
        line: number of the line that opens it.
        language: what stands behind the fence; empty without.
        section: the nearest heading above it.
        source: its text, dedented as the fence is.
    """

    page: str
    line: int
    language: str
    section: str
    source: str

    @property
    def place(self) -> str:
        """Where it is, as an editor and pytest's ``-k`` take it."""
        return f"{self.page}:{self.line}"


def find_blocks(page: str) -> list[Block]:
    """All blocks of a page, in order.

    Raises:
        ValueError: a block is not closed.
    """
    found = []
    section, opened, language, body = "", 0, "", list[str]()
    for number, text in enumerate((ROOT / page).read_text().splitlines(), start=1):
        fence = FENCE.match(text)
        if opened and fence:
            found.append(Block(page, opened, language, section, "\n".join(body) + "\n"))
            opened = 0
        elif opened:
            body.append(text)
        elif fence:
            opened, language, body = number, fence.group(1), []
        elif text.startswith("#"):
            section = text.lstrip("# ")
    if opened:
        raise ValueError(f"{page}:{opened}: the block is not closed")
    return found


def find_prose(page: str) -> str:
    """The page with its blocks blanked out; line numbers stay."""
    lines, inside = [], False
    for text in (ROOT / page).read_text().splitlines():
        fence = FENCE.match(text)
        lines.append("" if inside or fence else text)
        inside ^= bool(fence)
    return "\n".join(lines)


BLOCKS = [block for page in PAGES for block in find_blocks(page)]


def blocks_in(language: str) -> list[Block]:
    """The blocks of one language on all pages."""
    return [block for block in BLOCKS if block.language == language]


def front_end_of(block: Block) -> str:
    """"torch" or "tensorflow": by what the block names, else as the page's first block."""
    for candidate in (block, *(other for other in BLOCKS if other.page == block.page)):
        if candidate.language != "python":
            continue
        code = ast.unparse(ast.parse(candidate.source))  # without comments
        named = [name for name, pattern in FRONT_ENDS.items() if pattern.search(code)]
        if len(named) == 1:
            return named[0]
        if len(named) > 1:
            raise ValueError(f"{candidate.place} names both front ends: split it")
    return "torch"


def chain_of(block: Block) -> list[Block]:
    """The Python blocks of its page and front end, up to itself: they share their names."""
    return [other for other in blocks_in("python")
            if other.page == block.page and other.line <= block.line
            and front_end_of(other) == front_end_of(block)]

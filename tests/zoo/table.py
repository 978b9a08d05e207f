"""What is measured of a model, and the tables of docs/seng_models.md that are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

END = "<!-- end -->"


@dataclass(frozen=True)
class Measured:
    """``error`` is the largest relative error of a layer's direction, ``worst`` that layer."""

    parameters: int
    coverage: float
    error: float
    worst: str
    placements: tuple[str, ...]
    line: str
    gaps: tuple[tuple[str, int], ...]
    said: tuple[str, ...]


class EmbeddingBlock:
    """Lines that are printed and written to ``out/`` as they come, then into the page.

    Args:
        name: of the file, and of the comment in the page that the table follows.
        more: columns before the last.
    """

    def __init__(self, name: str, more: Sequence[str] = ()) -> None:
        self._name = name
        columns = ("model", "parameters", "with a rule", "samples on", "error", *more,
                   "why the rest has none")
        right = ("parameters", "with a rule", "error", *(one for one in more if one != "replicas equal"))
        self.lines = [f"| {' | '.join(columns)} |",
                      f"|{'|'.join('--:' if one in right else '---' for one in columns)}|"]
        print("\n".join(self.lines))

    def add_contribution(self, name: str, found: Measured, more: Sequence[str] = ()) -> None:
        """A model's line."""
        causes = "; ".join(f"{100 * count / found.parameters:.1f} % {cause}" for cause, count in found.gaps)
        share = f"{100 * found.coverage:.1f} %" if found.gaps else "100 %"
        cells = (name, f"{found.parameters:,}", share, ", ".join(found.placements), f"{found.error:.0e}",
                 *more, causes)
        self.lines.append(f"| {' | '.join(cells)} |")
        print(self.lines[-1], flush=True)
        out = Path("out")
        out.mkdir(exist_ok=True)
        (out / f"{self._name}.md").write_text("\n".join(self.lines) + "\n")

    def into_docs(self) -> None:
        """Between the page's two comments."""
        page, begin = Path("docs/seng_models.md"), f"<!-- out/{self._name}.md -->"
        head, rest = page.read_text().split(begin)
        page.write_text("\n".join([f"{head}{begin}", *self.lines, END]) + rest.split(END, 1)[1])

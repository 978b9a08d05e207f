"""What a natural-gradient preconditioner says about itself: data, and a table made of it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("layer", "kind", "held", "n", "n_G", "n_A", "groups", "rho", "kappa", "rank", "sketch",
           "bytes", "formula_bytes", "coefficient_norm", "jitter", "age", "failures")


class Report(dict[str, Any]):
    """A dict with ``layers`` (dicts with the keys of ``COLUMNS``) and totals; prints as a table."""

    def table(self) -> Table:
        """The layers as a table of the rich library."""
        table = Table(title=self._title())
        for column in COLUMNS:
            left = column in ("layer", "kind", "held", "sketch")
            table.add_column(column, justify="left" if left else "right", overflow="fold")
        for row in self["layers"]:
            table.add_row(*(_cell(row.get(column)) for column in COLUMNS))
        return table

    def _title(self) -> str:
        return (f"SENG at step {self['step']}: damping {self['damping']:g}, coupling "
                f"{self['coupling']}, {self['bytes']:,} bytes of curvature, "
                f"{self['identity_parameters']} parameters on the identity rule, "
                f"{self['failures']} failures, {self['skipped']} gradients not finite")

    def __str__(self) -> str:
        console = Console(width=200)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}"

"""What SENG reports about itself: one row per layer, totals, and a table made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from hvd_ext.seng.coverage_report import UncoveredParameters, coverage_line, group_by_reason
from hvd_ext.seng.plan import LayerPlan, LayerShape, elements_held
from hvd_ext.seng.settings import Settings

COLUMNS = ("layer", "kind", "held", "n", "n_G", "n_A", "groups", "rho", "kappa", "rank", "sketch",
           "bytes", "formula_bytes", "coefficient_norm", "jitter", "age", "failures", "samples")


@dataclass(frozen=True)
class LayerStats:
    """What a front end knows about the curvature that it holds for one layer.

    ``r`` is 0 for a layer without factors, ``itemsize`` the bytes of one stored number, ``nbytes``
    everything held, ``age`` the steps since the curvature was taken, ``kappa`` None where it is
    not known.
    """

    rho: int
    r: int
    itemsize: int
    nbytes: int
    jitter: float
    age: int
    coefficient_norm: float | None
    kappa: int | None = None


def layer_row(shape: LayerShape, plan: LayerPlan, held: LayerStats | None, *,
              failures: int) -> dict[str, Any]:
    """One layer's row; ``held`` is None while the layer has no curvature."""
    row: dict[str, Any] = {
        "layer": shape.name, "kind": shape.kind, "n": shape.n, "n_G": shape.n_g, "n_A": shape.n_a,
        "groups": shape.groups, "sketch": plan.sketch_text, "failures": failures,
        "held": "implicit" if plan.implicit else "explicit", "bytes": 0, "formula_bytes": 0,
    }
    if held is None:
        return {**row, "held": "identity"}
    if shape.lookup and (plan.implicit or not shape.product):
        kind = "implicit and rows used" if shape.product else "rows used"
        return {**row, "held": kind, "rho": held.rho, "rank": held.r, "bytes": held.nbytes,
                "formula_bytes": held.nbytes, "jitter": held.jitter, "age": held.age,
                "coefficient_norm": held.coefficient_norm}
    formula = held.itemsize * elements_held(shape, plan, rho=held.rho, r=held.r)
    return {**row, "rho": held.rho, "kappa": held.kappa, "rank": held.r or None,
            "bytes": held.nbytes, "formula_bytes": formula, "jitter": held.jitter,
            "coefficient_norm": held.coefficient_norm, "age": held.age}


def make_report(rows: Sequence[dict[str, Any]], settings: Settings, *, step: int, ranks: int,
                skipped: int, identity_parameters: int, parameters: int | None = None,
                gaps: Sequence[UncoveredParameters] = (), **more: Any) -> CurvatureReport:
    """The rows of all layers and their totals.

    Args:
        identity_parameters: those that have no curvature now.
        parameters: all trainable ones, where that is known.
        gaps: those that never get a curvature, and why.
    """
    lam = settings.damping_at(step)
    if parameters is not None:
        missing = sum(gap.count for gap in gaps)
        more = {"coverage": (parameters - missing) / max(parameters, 1),
                "coverage_line": coverage_line(parameters, gaps, settings.fallback_text),
                "without_rule": {cause: {"parameters": sum(gap.count for gap in group),
                                         "modules": [gap.what for gap in group]}
                                 for cause, group in group_by_reason(gaps).items()}, **more}
    return CurvatureReport(
        layers=list(rows), step=step, damping=lam, coupling=settings.coupling,
        ranks=ranks, bytes=sum(row["bytes"] for row in rows),
        formula_bytes=sum(row["formula_bytes"] for row in rows),
        identity_parameters=identity_parameters, failures=sum(row["failures"] for row in rows),
        skipped=skipped, rate_ratio=settings.fallback_divisor(lam) / lam, fallback=settings.fallback, **more)


class CurvatureReport(dict[str, Any]):
    """A dict with ``layers`` (dicts with the keys of ``COLUMNS``) and totals; prints as a table."""

    def build_table(self) -> Table:
        """The layers as a table of the rich library."""
        table = Table(title=self._table_title())
        for column in COLUMNS:
            left = column in ("layer", "kind", "held", "sketch")
            table.add_column(column, justify="left" if left else "right", overflow="fold")
        for row in self["layers"]:
            table.add_row(*(_format_cell(row.get(column)) for column in COLUMNS))
        return table

    def _table_title(self) -> str:
        return (f"SENG at step {self['step']}: damping {self['damping']:g}, coupling "
                f"{self['coupling']}, {self['bytes']:,} bytes of curvature, "
                f"{self['identity_parameters']:,} parameters without curvature (their step is "
                f"{1 / self['rate_ratio']:.2g} of that of directions outside of U), "
                f"{self['failures']} failures, {self['skipped']} gradients not finite")

    def __str__(self) -> str:
        console = Console(width=200, force_terminal=False, color_system=None)  # text, on a terminal too
        with console.capture() as capture:
            console.print(self.build_table())
        lead = f"{self['coverage_line']}\n" if "coverage_line" in self else ""
        return lead + capture.get()


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}"

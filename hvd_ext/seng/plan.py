"""Which layers keep U and which only its factors, at what sizes, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hvd_ext.seng.settings import Settings


@dataclass(frozen=True)
class LayerShape:
    """What the plan needs to know of a layer.

    ``n`` counts its trainable parameters, ``product`` says whether the gradient of a sample is a
    product ``G_i A_i^T`` (linear layers and convolutions) of ``groups`` blocks ``n_g × n_a``;
    ``n_a`` counts the rows of ones that stand for biases. Other layers have ``n_g = n`` and
    ``n_a = 1``. ``lookup``: a table of which a sample uses some rows, and only those are held; with
    ``product`` it is a linear layer's weight as well.
    """

    name: str
    kind: str
    n: int
    n_g: int
    n_a: int
    groups: int = 1
    product: bool = True
    lookup: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """How a layer's curvature is held.

    ``implicit``: only G_i and A_i are kept. ``sketch``: q, the sampled rows of an explicit layer,
    None for all. ``rank``: most columns kept a sample, None for explicit layers; ``adaptive``: no more of
    them than the damping leaves meaningful. ``rows_g`` and
    ``rows_a``: zeta_G and zeta_A, sampled rows of an implicit layer's factors, None for all.
    """

    implicit: bool
    sketch: int | None = None
    rank: int | None = None
    adaptive: bool = False
    rows_g: int | None = None
    rows_a: int | None = None

    @property
    def sampled(self) -> list[str]:
        """Which of "rows", "rows_g" and "rows_a" are sampled."""
        counts = {"rows": self.sketch, "rows_g": self.rows_g, "rows_a": self.rows_a}
        return [label for label, count in counts.items() if count is not None]

    @property
    def sketch_text(self) -> str | None:
        """The sketch for a report: ``"512"``, ``"512 × all"``, or None for no sketch."""
        if not self.implicit:
            return None if self.sketch is None else str(self.sketch)
        rows = [str(count or "all") for count in (self.rows_g, self.rows_a)]
        return " × ".join(rows) if self.rows_g or self.rows_a else None


def plan_layer(shape: LayerShape, settings: Settings) -> LayerPlan:
    """Explicit below ``explicit_threshold``, implicit at or above it (SENG Algorithm 1)."""
    if shape.product and shape.n >= settings.explicit_threshold:
        return LayerPlan(
            implicit=True,
            rank=settings.most_columns,
            adaptive=settings.rank == "auto",
            rows_g=None if shape.lookup else _kept_rows(shape.n_g, settings.row_sketch, settings),
            rows_a=None if shape.lookup else _kept_rows(shape.n_a, settings.row_sketch, settings),
        )
    if shape.lookup and not shape.product:
        return LayerPlan(implicit=False)
    return LayerPlan(implicit=False, sketch=_kept_rows(shape.n, settings.sketch_size, settings))


TOLERANCE = 0.05


def negligible_error(lam: Any) -> Any:
    """What may be left out of ``||U||_F^2`` of a layer: ``(0.05)^2 lam``.

    With U = V + E, where E is what is cut off, ``U U^T + lam I`` changes by ``V E^T + E V^T + E E^T``.
    Measured in its own metric that is at most ``2 e + e^2`` with ``e = ||E||_F / sqrt(lam)``: a tenth
    for e = 0.05.
    """
    return TOLERANCE**2 * lam


def elements_held(shape: LayerShape, plan: LayerPlan, *, rho: int, r: int = 0) -> int:
    """Numbers stored for a layer by SENG Table 2: U and its sketch, or the factors and theirs.

    Explicit: ``rho n``, and ``rho q`` for a sketch kept beside it. Implicit:
    ``(n_G + n_A) r rho``, and ``(zeta_G + zeta_A) r rho`` for sketched factors, a group at a time.
    """
    if not plan.implicit:
        return rho * (shape.n + (plan.sketch or 0))
    rows = shape.n_g + shape.n_a + (plan.rows_g or 0) + (plan.rows_a or 0)
    return shape.groups * rows * r * rho


def _kept_rows(rows: int, limit: int, settings: Settings) -> int | None:
    return limit if settings.sketch is not None and rows > limit else None

"""What SENG reports about the state that it keeps. The state itself is tf.Variables of its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from hvd_ext.seng import CurvatureReport, Settings, layer_row, make_report
from hvd_ext.tensorflow.seng.check import REASON
from hvd_ext.tensorflow.seng.inventory import FIRST, Layer
from hvd_ext.tensorflow.seng.system import LayerSystem


@dataclass
class Coverage:
    """What of a model has a rule: its layers, and why others with trained weights have none."""

    layers: Sequence[Layer]
    without_rule: Mapping[str, str]
    model: keras.Model

    def line(self, refused: Sequence[Layer]) -> str:
        """One line: the fraction of the parameters with a rule, and why the others have none.

        Args:
            refused: layers whose captured samples did not sum to their gradient.
        """
        whole = sum(int(np.prod(weight.shape)) for weight in self.model.trainable_weights)
        covered = sum(layer.n for layer in self.layers) - sum(layer.n for layer in refused)
        why = [f"{name}: {reason}" for name, reason in self.without_rule.items()]
        why += [f"{layer.name}: {REASON}" for layer in refused]
        rest = whole - covered
        if rest and not why:
            why = ["named in exclude="]
        said = f"; g/(1 + damping) for {rest:,}: {'; '.join(why)}" if rest else ""
        return f"SENG has curvature for {covered / max(whole, 1):.1%} of {whole:,} parameters{said}"


class Report(CurvatureReport):
    """The curvature's report; the first line that it prints is the coverage."""

    def __str__(self) -> str:
        return f"{self['coverage']}\n{super().__str__()}"


def report(systems: Sequence[LayerSystem], settings: Settings, coverage: Coverage | None, *, step: int,
           skipped: int, ranks: int) -> CurvatureReport:
    """All layers' rows, see :data:`hvd_ext.seng.report.COLUMNS`, and totals.

    Args:
        coverage: None while the model is not built.
    """
    rows: list[dict[str, Any]] = []
    refused = [one.layer for one in systems if bool(one.refused)]
    for one in systems:
        rows.append(layer_row(one.layer.shape, one.layer.plan, one.held(step), failures=int(one.failures)))
        rows[-1]["samples"] = one.layer.samples
        rows[-1]["reason"] = REASON if one.layer in refused else None
    parameters = 0 if coverage is None else sum(
        int(np.prod(weight.shape)) for weight in coverage.model.trainable_weights)
    covered = sum(one.layer.n for one in systems if bool(one.ready))
    return Report(make_report(
        rows, settings, step=step, ranks=ranks, skipped=skipped, identity_parameters=parameters - covered,
        coverage="the model is not built yet" if coverage is None else coverage.line(refused),
        samples={one.layer.name: one.layer.samples for one in systems if one.layer.samples != FIRST}))

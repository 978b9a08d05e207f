"""What SENG reports about the state that it keeps. The state itself is tf.Variables of its modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from hvd_ext.seng import CurvatureReport, Settings, layer_row, make_report
from hvd_ext.seng.coverage_report import UncoveredParameters
from hvd_ext.seng.sample_axes import describe_placement
from hvd_ext.tensorflow.seng.check import reason_of
from hvd_ext.tensorflow.seng.layer_curvature import LayerCurvature


@dataclass
class Coverage:
    """What of a model has no rule, and the model."""

    missing: Sequence[UncoveredParameters]
    model: keras.Model


def report(systems: Sequence[LayerCurvature], settings: Settings, coverage: Coverage | None, *, step: int,
           skipped: int, ranks: int) -> CurvatureReport:
    """All layers' rows, see :data:`hvd_ext.seng.report.COLUMNS`, and totals.

    Args:
        coverage: None while the model is not built.
    """
    rows: list[dict[str, Any]] = []
    refused = {one.layer: reason_of(one.layer) for one in systems if bool(one.refused)}
    for one in systems:
        rows.append(layer_row(one.layer.shape, one.layer.plan, one.layer_stats(step),
                              failures=int(one.failures)))
        where = one.layer.samples
        rows[-1].update(samples=None if where is None else describe_placement(where),
                        refused=refused.get(one.layer))
    if coverage is None:
        return make_report(rows, settings, step=step, ranks=ranks, skipped=skipped, identity_parameters=0,
                           coverage_line="SENG waits for the first batch of a model that is not built yet.")
    parameters = sum(int(np.prod(weight.shape)) for weight in coverage.model.trainable_weights)
    gaps = [*coverage.missing, *(UncoveredParameters(layer.name, layer.registered.kind, reason, layer.n)
                                 for layer, reason in refused.items())]
    covered = sum(one.layer.n for one in systems if bool(one.ready))
    return make_report(rows, settings, step=step, ranks=ranks, skipped=skipped,
                       identity_parameters=parameters - covered, parameters=parameters, gaps=gaps)

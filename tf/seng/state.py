"""What SENG reports about the state that it keeps. The state itself is tf.Variables of its modules."""

from __future__ import annotations

from collections.abc import Sequence

from hvd_ext.seng import CurvatureReport, Settings, layer_row, make_report
from hvd_ext.tensorflow.seng.system import LayerSystem


def report(systems: Sequence[LayerSystem], settings: Settings, parameters: int, *, step: int,
           skipped: int, ranks: int) -> CurvatureReport:
    """All layers' rows, see :data:`hvd_ext.seng.report.COLUMNS`, and totals.

    Args:
        parameters: of the whole model.
    """
    rows = [layer_row(one.layer.shape, one.layer.plan, one.held(step), failures=int(one.failures))
            for one in systems]
    covered = sum(one.layer.n for one in systems if bool(one.ready))
    return make_report(rows, settings, step=step, ranks=ranks, skipped=skipped,
                       identity_parameters=parameters - covered)

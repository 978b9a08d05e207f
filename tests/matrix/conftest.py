"""The count under a run of the matrix."""

from __future__ import annotations

import os
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many cases there were, how many ended and how many hung."""
    from tests.matrix.cases import every_case
    from tests.matrix.test_matrix import COUNTS

    if COUNTS:
        drawn = os.environ.get("HVD_EXT_MATRIX", "")
        seed = f", {drawn} of those drawn with seed {os.environ.get('HVD_EXT_SEED', '0')}" if drawn else ""
        terminalreporter.write_line(f"matrix: {COUNTS['cases']} of {len(every_case())} combinations{seed}: "
                                    f"{COUNTS['ended']} ended, {COUNTS['hung']} hung")

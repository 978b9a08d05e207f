"""The counts under a soak."""

from __future__ import annotations

import os
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many strikes there were by kind and fault, and after how many training went on."""
    from tests.soak.test_soak import COUNTS, SEED

    if not COUNTS:
        return
    write = terminalreporter.write_line
    struck, went_on = (sum(count for key, count in COUNTS.items() if key[0] == what)
                       for what in ("struck", "went on"))
    write(f"soak, seed {SEED}: {struck} strikes, after {went_on} of them training went on as undisturbed")
    for _, kind, fault in sorted(key for key in COUNTS if key[0] == "struck"):
        write(f"  {kind}, {fault}: {COUNTS['went on', kind, fault]} of {COUNTS['struck', kind, fault]}")
    if os.geteuid() != 0:
        write("  full disks were left out: they need root")

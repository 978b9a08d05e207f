"""The command that runs a benchmark's module on several ranks of this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tests.ranks import launch_command


def under_mpirun() -> bool:
    """Whether this process is a rank already."""
    return "OMPI_COMM_WORLD_RANK" in os.environ


def mpirun(ranks: int, module: str, arguments: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    """``mpirun -np ranks python -m module arguments``, with further options of mpirun."""
    return launch_command(ranks, [sys.executable, "-m", module, *arguments], mpirun_args=options)

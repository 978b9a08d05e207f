"""The command that runs a benchmark's module on several ranks of this machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def under_mpirun() -> bool:
    """Whether this process is a rank already."""
    return "OMPI_COMM_WORLD_RANK" in os.environ


def mpirun(ranks: int, module: str, arguments: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    """``mpirun -np ranks python -m module arguments``, with further options of mpirun.

    Raises:
        SystemExit: there is no mpirun.
    """
    near = Path(sys.executable).parent / "mpirun"
    found = str(near) if near.exists() else shutil.which("mpirun")
    if found is None:
        raise SystemExit("mpirun was not found; activate the environment that Horovod is in")
    if os.geteuid() == 0:
        options = ["--allow-run-as-root", *options]
    return [found, "-np", str(ranks), "--oversubscribe", "--bind-to", "none", *options,
            sys.executable, "-m", module, *arguments]

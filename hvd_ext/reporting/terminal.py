"""Whether a person sees what a process prints, or a file gets it."""

from __future__ import annotations

import os
import stat
import sys
from typing import IO, Any

from rich.console import Console

LAUNCHED = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "HOROVOD_RANK", "SLURM_PROCID")  # set for ranks
TERMINALS = {4, 5, *range(136, 144)}  # Linux: major numbers of consoles and of pseudo-terminals


def is_terminal(stream: IO[str]) -> bool:
    """Whether what is written to a stream comes to a terminal.

    Open MPI gives every rank a terminal of its own, and passes on what is written there to wherever its own
    output goes: into a log too. So on a rank it is the launcher's output that counts.
    """
    try:
        number = stream.fileno()
    except (AttributeError, OSError, ValueError):  # no file, or closed
        return False
    if not os.isatty(number):
        return False
    if not any(name in os.environ for name in LAUNCHED):
        return True
    own, process = os.fstat(number).st_rdev, os.getppid()
    while process > 1:
        try:
            output = os.stat(f"/proc/{process}/fd/{number}")
            with open(f"/proc/{process}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except OSError:  # no /proc, or another user's process
            return False
        if not (stat.S_ISCHR(output.st_mode) and output.st_rdev == own):
            return stat.S_ISCHR(output.st_mode) and os.major(output.st_rdev) in TERMINALS
        process = parent
    return False


def make_console(stream: IO[str] | None = None, **options: Any) -> Console:
    """A console on a stream (by default the standard output of this moment), without escape codes in logs."""
    stream = sys.stdout if stream is None else stream
    return Console(file=stream, force_terminal=None if is_terminal(stream) else False, **options)

"""Open MPI from a wheel: its place, for programs that are started without ``mpirun``."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

LIBRARY = re.compile(r"\S*/libmpi\.so[.\d]*$")


def loaded_library(maps: Path = Path("/proc/self/maps")) -> Path | None:
    """The ``libmpi`` that this process has loaded, if any."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        found = LIBRARY.search(line)
        if found:
            return Path(found.group())
    return None


def set_opal_prefix() -> None:
    """Set ``OPAL_PREFIX`` when the loaded Open MPI is the one in this Python environment.

    The wheel is moved from where it was built, so its library finds its parts only by this
    variable. ``mpirun`` sets it; ``python train.py`` on one rank does not, and would abort.
    """
    library = loaded_library()
    prefix = Path(sys.prefix).resolve()
    if library is not None and library.resolve().is_relative_to(prefix):
        os.environ.setdefault("OPAL_PREFIX", str(prefix))

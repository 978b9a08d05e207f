"""A process must be able to end after others have died.

``MPI_Finalize`` waits for all ranks. Open MPI started with ``--enable-recovery`` lets it pass when
some have died, but not reliably when several die at once. By then everything has been written and reported.
"""

from __future__ import annotations

import atexit
import signal

EXIT_TIMEOUT_S = 30

_bounded = False


def set_exit_deadline() -> None:
    """From now on the operating system ends this process if its own ending takes too long."""
    global _bounded
    if not _bounded and hasattr(signal, "alarm"):
        _bounded = True
        atexit.register(_set_alarm)


def _set_alarm() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(EXIT_TIMEOUT_S)

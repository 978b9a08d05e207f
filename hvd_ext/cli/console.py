"""What every subcommand prints with, and the error that ends one without a traceback."""

import sys

from rich.console import Console

from hvd_ext.reporting.terminal import make_console


class CliError(Exception):
    """A command cannot go on. ``str(failure)`` says what is wrong, ``remedy`` what to do about it."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.remedy = remedy


def stdout_console() -> Console:
    """A console on the standard output of this moment (tests replace it between calls)."""
    return make_console(sys.stdout, highlight=False)


def stderr_console() -> Console:
    """A console on the standard error of this moment."""
    return make_console(sys.stderr, highlight=False)

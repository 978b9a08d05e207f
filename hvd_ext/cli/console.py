"""What every subcommand prints with, and the error that ends one without a traceback."""

import sys

from rich.console import Console


class CliError(Exception):
    """A command cannot go on. ``str(failure)`` says what is wrong, ``remedy`` what to do about it."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.remedy = remedy


def stdout_console() -> Console:
    """A console on the standard output of this moment (tests replace it between calls)."""
    return Console(file=sys.stdout, highlight=False)


def stderr_console() -> Console:
    """A console on the standard error of this moment."""
    return Console(file=sys.stderr, highlight=False)

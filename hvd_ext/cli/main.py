"""Entry point of ``hvd-ext``."""

import argparse
import importlib
from collections.abc import Sequence
from typing import Protocol, cast

from rich.markup import escape

from hvd_ext.cli.console import CliError, stderr_console
from hvd_ext.versions import HVD_EXT

# One module of hvd_ext.cli a subcommand; each has `register(subcommands)`.
COMMANDS = (
    "install_horovod",
    "doctor",
    "plan",
    "timeline",
    "launch",
)


class Command(Protocol):
    """What a subcommand does with its parsed arguments; the result is the exit status."""

    def __call__(self, args: argparse.Namespace) -> int: ...


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; every subcommand sets ``run`` to its function."""
    top = argparse.ArgumentParser(prog="hvd-ext", description="Tools of hvd-ext.")
    top.add_argument("--version", action="version", version=f"hvd-ext {HVD_EXT}")
    subcommands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"hvd_ext.cli.{name}").add_subcommand(subcommands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit status: 0 done, 1 a problem that was printed with what to do about it, 130 interrupted.
    """
    args = build_parser().parse_args(argv)
    try:
        return cast(Command, args.run)(args)
    except CliError as failure:
        stderr_console().print(f"[bold red]hvd-ext:[/] {escape(str(failure))}", soft_wrap=True)
        if failure.remedy:
            stderr_console().print(f"[bold]What to do:[/] {escape(failure.remedy)}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        stderr_console().print("hvd-ext: interrupted")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())

"""Gives command lines to the real argument parsers: ``python -m tests.docs.programs LINES``.

LINES are JSON, a list of [module, argument, ...]; printed is a JSON list of what is wrong with each, or null.
A module runs until it has parsed its arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import runpy
import sys
from typing import Any


class Parsed(Exception):
    """The arguments were accepted."""


def refusal_of(module: str, arguments: list[str]) -> str | None:
    """What the module's parser says against the arguments."""
    kept, parse = sys.argv, argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        parse(self, args, namespace)
        raise Parsed

    sys.argv = [module, *arguments]
    argparse.ArgumentParser.parse_args = parse_and_stop  # type: ignore[method-assign]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Parsed:
        return None
    except SystemExit as ended:
        return None if ended.code in (0, None) and "--help" in arguments else said.getvalue() or repr(ended)
    finally:
        sys.argv, argparse.ArgumentParser.parse_args = kept, parse  # type: ignore[method-assign]
    return "it ran without parsing its arguments"


if __name__ == "__main__":
    lines = json.loads(sys.argv[1])
    print(json.dumps([refusal_of(module, arguments) for module, *arguments in lines]))

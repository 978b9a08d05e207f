"""How many functions have a name of one word, by folder.

    python -m scripts.function_names                    # hvd_ext, torch_ext and tf
    python -m scripts.function_names torch_ext --list

Functions of modules and classes count; properties, functions inside of functions and names that Python
defines (``__init__``) do not.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("hvd_ext", "torch_ext", "tf")


def is_one_word(name: str) -> bool:
    """Whether a name is a single word, leading underscores aside."""
    return "_" not in name.strip("_")


def function_names(source: str) -> Iterator[str]:
    """The names of a module's functions and methods."""
    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                dunder = child.name.startswith("__") and child.name.endswith("__")
                is_property = any("property" in ast.unparse(one) or ".setter" in ast.unparse(one)
                                  for one in child.decorator_list)
                if not dunder and not is_property:
                    yield child.name
            elif not isinstance(child, ast.expr):
                yield from visit(child)

    yield from visit(ast.parse(source))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(prog="python -m scripts.function_names", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=FOLDERS, help="below the repository's root")
    parser.add_argument("--list", action="store_true", help="print the names of one word too")
    args = parser.parse_args(argv)
    for folder in args.folders:
        names = [name for path in sorted((ROOT / folder).rglob("*.py"))
                 for name in function_names(path.read_text())]
        short = [name for name in names if is_one_word(name)]
        print(f"{folder}: {len(short)} of {len(names)}, {len(short) / max(len(names), 1):.0%}")
        if args.list:
            print("  " + " ".join(sorted(set(short))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Names of the public interface in README.md and docs/*.md: ``python -m tests.docs.references MODULES``.

Reads a JSON list of expressions from standard input and prints a JSON list of what is wrong with each.
``hvd`` stands for the first module that has the name; ``name=`` is an argument of any public call.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from tests.docs.blocks import PAGES, blocks_in, find_prose

PACKAGES = ("hvd", "hvd_ext", "horovod")


def find_references() -> Iterator[tuple[str, str]]:
    """``page:line`` and source of expressions that name the public interface, in blocks and in the text."""
    for block in blocks_in("python"):
        for node in ast.walk(ast.parse(block.source)):
            if isinstance(node, ast.Call | ast.Attribute) and _root(node) in PACKAGES:
                yield f"{block.page}:{block.line + node.lineno}", ast.unparse(node)
        for number, line in enumerate(block.source.splitlines(), start=1):
            for name in re.findall(r"\bhvd(?:\.\w+)+", line.partition("#")[2]):
                yield f"{block.page}:{block.line + number}", name
    for page in PAGES:
        prose = find_prose(page)
        for found in re.finditer(r"`([^`]+)`", prose):
            place = f"{page}:{prose[:found.start()].count(chr(10)) + 1}"
            yield from ((place, one) for one in _in_text(" ".join(found.group(1).split())))


def _in_text(text: str) -> Iterator[str]:
    argument = re.match(r"([a-z]\w*)=(?!=)", text)
    if argument:
        yield f"{argument.group(1)}="
        text = text[argument.end():]
    try:
        nodes = list(ast.walk(ast.parse(re.sub(r"=(?=[,)])", "=...", text))))
    except SyntaxError:
        yield from re.findall(r"(?<![\w.])hvd(?:\.\w+)+", text)
        return
    for node in nodes:
        named = _root(node) in PACKAGES or _root(node)[:1].isupper()
        if isinstance(node, ast.Call | ast.Attribute) and named:
            yield ast.unparse(node)


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Call | ast.Attribute):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def problem_of(source: str, modules: list[ModuleType]) -> str | None:
    """What is wrong with an expression, whichever of the modules ``hvd`` is."""
    found = ""
    if source.endswith("="):
        return None if source[:-1] in _arguments(*modules) else f"no call takes {source}"
    for module in modules:
        try:
            _evaluate(ast.parse(source, mode="eval").body, module)
            return None
        except (AttributeError, ImportError, TypeError) as error:
            found = f"{source}: {error}"
    return found


class _Result:
    """What a call returns: anything may be asked of it."""


def _evaluate(node: ast.AST, module: ModuleType) -> Any:
    """What a chain of attributes is; of a call that its arguments fit."""
    if isinstance(node, ast.Name) and node.id[0].isupper():
        return getattr(module, node.id, _Result())  # another package's, unless we have it
    if isinstance(node, ast.Name):
        return module if node.id == "hvd" else _import(node.id)
    if isinstance(node, ast.Attribute):
        owner = _evaluate(node.value, module)
        if isinstance(owner, _Result):
            return owner
        if isinstance(owner, ModuleType) and owner is not module and not hasattr(owner, node.attr):
            return _import(f"{owner.__name__}.{node.attr}")
        return getattr(owner, node.attr)
    assert isinstance(node, ast.Call)
    function = _evaluate(node.func, module)
    if not isinstance(function, _Result):
        arguments = [one for one in node.args if not isinstance(one, ast.Constant) or one.value is not ...]
        inspect.signature(function).bind_partial(
            *arguments, **{keyword.arg: None for keyword in node.keywords if keyword.arg is not None})
    return _Result()


@functools.cache
def _arguments(*modules: ModuleType) -> set[str]:
    """The arguments of all public calls and methods of modules, of their callbacks and elastic states."""
    owners = [*modules, *(getattr(module, name) for module in modules for name in ("callbacks", "elastic")
                          if hasattr(module, name))]
    values = [getattr(owner, name) for owner in owners for name in dir(owner) if not name.startswith("_")]
    values = [value for value in values if str(getattr(value, "__module__", "")).startswith(PACKAGES[1:])]
    values += [getattr(value, name) for value in values if inspect.isclass(value)
               for name in dir(value) if not name.startswith("_")]
    found: set[str] = set()
    for value in values:
        with contextlib.suppress(TypeError, ValueError):
            found |= inspect.signature(value).parameters.keys()
    return found


def _import(name: str) -> ModuleType:
    """A module, unless it is of a front end that this process has not got."""
    for front_end, part in (("tensorflow", "tensorflow"), ("tensorflow", "keras"), ("torch", "torch")):
        if part in name.split(".") and front_end not in sys.modules:
            raise ImportError(f"{name} is asked where {front_end} is imported")
    return importlib.import_module(name)


if __name__ == "__main__":
    given = [importlib.import_module(name) for name in sys.argv[1].split(",")]
    print(json.dumps([problem_of(source, given) for source in json.load(sys.stdin)]))

"""Public names have docstrings of one format, and mkdocs.yml names every page; pages are short."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from scripts.public_names import MODULES, find_definition, public_names
from tests.docs.blocks import PAGES, ROOT

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Source")
LONGEST_PAGE = 150  # lines
Definition = ast.FunctionDef | ast.ClassDef


@cache
def definitions() -> dict[str, tuple[Path, Definition]]:
    """Each public function and class once, under the first name that it has."""
    found: dict[tuple[Path, str], tuple[str, Definition]] = {}
    for module in MODULES:
        for name in public_names(module):
            file, node = find_definition(module, name)
            if node is not None:
                found.setdefault((file, node.name), (f"{module}.{name}", node))
    return {name: (file, node) for (file, _), (name, node) in found.items()}


def sections_of(docstring: str) -> dict[str, list[str]]:
    """The lines under each heading of a docstring."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in docstring.splitlines():
        heading = re.fullmatch(r"([A-Z]\w+):", line)
        if heading:
            current = heading.group(1)
            found[current] = []
        else:
            found[current].append(line)
    return found


def arguments_of(node: Definition) -> tuple[set[str], bool]:
    """Names of a call's arguments, and whether it takes others by ``**``."""
    function: ast.AST | None = node
    if isinstance(node, ast.ClassDef):
        function = next((one for one in node.body
                         if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
        if function is None:
            fields = {one.target.id for one in node.body
                      if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)}
            return fields, bool(node.bases)
    assert isinstance(function, ast.FunctionDef)
    names = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    more = [one for one in (function.args.vararg, function.args.kwarg) if one is not None]
    return {one.arg for one in (*names, *more)} - {"self", "cls"}, function.args.kwarg is not None


def faults_of(name: str, node: Definition) -> list[str]:
    """Where a docstring is not in the format."""
    docstring = ast.get_docstring(node)
    if docstring is None:
        return ["there is no docstring"]
    found, sections = [], sections_of(docstring)
    summary = docstring.split("\n\n")[0]
    if not summary.endswith((".", ":")):
        found.append("the summary does not end with a full stop")
    function = isinstance(node, ast.FunctionDef)
    if function and not re.match(r"[A-Z][a-z]+(?<!s) (?!s\b)", summary):
        found.append("the summary does not begin with a verb in the imperative")
    if function and re.match(r"(The|A|An|Whether|What|All|This|Per)\b", summary):
        found.append("the summary does not begin with a verb in the imperative")
    headings = [one for one in sections if one]
    if headings != [one for one in SECTIONS if one in headings]:
        found.append(f"sections are {headings}, in order they are {SECTIONS}")
    takes, others = arguments_of(node)
    documented = {line.strip().partition(":")[0] for line in sections.get("Args", [])
                  if re.match(r"    \S", line)}
    if "Args" in sections and not others and documented - takes:
        found.append(f"Args that the call does not take: {sorted(documented - takes)}")
    if function and takes - documented:
        found.append(f"arguments without a line under Args: {sorted(takes - documented)}")
    return found


def test_there_are_public_names():
    assert len(definitions()) > 60


@pytest.mark.parametrize("name", sorted(definitions()))
def test_docstring_is_in_the_format(name: str) -> None:
    assert faults_of(name, definitions()[name][1]) == []


@pytest.mark.parametrize(("source", "fault"), [
    ("def f(): pass", "no docstring"),
    ("def f():\n    '''Returns one.'''", "imperative"),
    ("def f():\n    '''The sum.'''", "imperative"),
    ("def f():\n    '''Add'''", "full stop"),
    ("def f(a):\n    '''Add.'''", "without a line"),
    ("def f():\n    '''Add.\n\n    Args:\n        a: one.\n    '''", "does not take"),
    ("def f():\n    '''Add.\n\n    Raises:\n        E: no.\n\n    Args:\n        a: 1.\n    '''", "order"),
])
def test_a_docstring_in_another_format_is_noticed(source: str, fault: str) -> None:
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    assert fault in " ".join(faults_of("f", node))


def test_navigation_names_every_page():
    text = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r"^ +- .*: ([\w./]+\.md)$", text, re.M)
    pages = {"index.md" if page == "README.md" else page.removeprefix("docs/") for page in PAGES}
    assert sorted(named) == sorted({*pages, *(f"api/{module}.md" for module in MODULES)})


@pytest.mark.parametrize("page", PAGES)
def test_page_is_short(page: str) -> None:
    text = re.sub(r"<!-- .*? -->\n\|.*?<!-- .*? -->\n", "", (ROOT / page).read_text(), flags=re.S)
    assert len(text.splitlines()) <= LONGEST_PAGE  # without generated tables


@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in ("material", "mkdocstrings")),
                    reason="mkdocs is not installed: pip install '.[docs]'")
def test_site_builds_without_warnings(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
                          cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DelayCompensated" in (tmp_path / "api" / "hvd_ext.torch" / "index.html").read_text()

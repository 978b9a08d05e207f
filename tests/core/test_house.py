"""The rules of the house that a test can hold: who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = {"torch", "tensorflow", "keras", "horovod"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "hvd_ext").rglob("*.py")),
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_decisions_import_no_framework(path):
    assert not {name for name in imported(path) if name.split(".")[0] in FRAMEWORKS}
    assert not {name for name in imported(path)
                if name.startswith(("hvd_ext.torch", "hvd_ext.tensorflow"))}


@pytest.mark.parametrize(("folder", "other"), [("torch_ext", "hvd_ext.tensorflow"), ("tf", "hvd_ext.torch")])
def test_front_ends_do_not_import_each_other(folder, other):
    for path in (ROOT / folder).rglob("*.py"):
        assert not {name for name in imported(path) if name.startswith(other)}, path


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "reference").glob("*.py")), ids=lambda p: p.name)
def test_oracles_are_independent_of_what_they_check(path):
    assert not {name for name in imported(path) if name.split(".")[0] == "hvd_ext"}

"""The rules of the house that a test can hold: who imports whom, which modules there are, how long."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from scripts.function_names import function_names, is_one_word

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


# Other names of a front end: nothing but imports of it.
FRONT_END_NAMES = {"hvd_ext/keras/__init__.py"}


@pytest.mark.parametrize("path", sorted((ROOT / "hvd_ext").rglob("*.py")),
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_decisions_import_no_framework(path):
    assert not {name for name in imported(path) if name.split(".")[0] in FRAMEWORKS}
    assert str(path.relative_to(ROOT)) in FRONT_END_NAMES or not {
        name for name in imported(path) if name.startswith(("hvd_ext.torch", "hvd_ext.tensorflow"))}


@pytest.mark.parametrize("name", sorted(FRONT_END_NAMES))
def test_names_of_front_ends_hold_no_code_and_are_imported_by_none(name):
    allowed = (ast.Import, ast.ImportFrom, ast.Expr, ast.Assign)
    assert all(isinstance(node, allowed) for node in ast.parse((ROOT / name).read_text()).body)
    module = str(Path(name).parent).replace("/", ".")
    for folder in ("hvd_ext", "torch_ext", "tf"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not {one for one in imported(path) if one == module or one.startswith(module + ".")}, path


@pytest.mark.parametrize(("folder", "other"), [("torch_ext", "hvd_ext.tensorflow"), ("tf", "hvd_ext.torch")])
def test_front_ends_do_not_import_each_other(folder, other):
    for path in (ROOT / folder).rglob("*.py"):
        assert not {name for name in imported(path) if name.startswith(other)}, path


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "reference").glob("*.py")), ids=lambda p: p.name)
def test_oracles_are_independent_of_what_they_check(path):
    assert not {name for name in imported(path) if name.split(".")[0] == "hvd_ext"}


def test_training_does_not_import_the_planner():
    for folder in ("hvd_ext", "torch_ext", "tf"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.relative_to(ROOT).parts[:2] not in (("hvd_ext", "planning"), ("hvd_ext", "cli")):
                assert not {name for name in imported(path) if name.startswith("hvd_ext.planning")}, path


MOST_LOOSE = 8  # files of hvd_ext/ outside of its packages
LONGEST = 400  # lines


def test_few_files_of_decisions_are_outside_of_a_package():
    loose = {path.name for path in (ROOT / "hvd_ext").glob("*.py")} - {"__init__.py"}
    assert len(loose) <= MOST_LOOSE, loose


@pytest.mark.parametrize("folder", ["hvd_ext", "torch_ext", "tf", "benchmarks", "examples"])
def test_no_file_has_grown_too_long(folder):
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines())
               for path in (ROOT / folder).rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize("folder", ["hvd_ext", "torch_ext", "tf"])
def test_functions_are_named_by_a_verb_and_its_object(folder):
    """Most of them: a word is enough where it is the field's term (``allreduce``, ``flush``, ``poll``)."""
    names = [name for path in (ROOT / folder).rglob("*.py") for name in function_names(path.read_text())]
    assert len(names) > 100
    assert sum(map(is_one_word, names)) <= 0.25 * len(names)


def test_what_counts_as_a_function_name():
    source = """
def one():
    def inner(): ...
class A:
    def __init__(self): ...
    def two_words(self): ...
    @property
    def size(self): ...
"""
    assert list(function_names(source)) == ["one", "two_words"]
    assert is_one_word("_one")
    assert not is_one_word("_two_words")

"""The rules of the house that a test can hold: who imports whom, which modules there are, how long."""

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


FRONT_ENDS = {"torch": ROOT / "torch_ext", "tensorflow": ROOT / "tf"}
TENSORFLOW_ALONE = {"tape", "traffic", "variables", "keras_store", "keras_hooks", "keras2", "narrow",
                    "waiting", "retracing", "padded", "belonging",
                    "transaction", "reducers/presence", "session_hook",
                    *(f"seng/{name}" for name in ("traces", "start", "einsum", "table"))}
TORCH_ALONE = {"passes", "mpi_ops", "lightning", "owned_state", "kernels", "host_copies",
               "kernels_triton", "optimizer_state", "optimizer_broadcast", "state_exchange", "closures",
               "reducers/delay_step", "reducers/frozen", "reducers/late_step",
               "reducers/layouts", "hooks",
               "seng/pending",
               *(f"seng/{name}" for name in ("attention", "eager", "functions", "joint", "light", "lookup",
                                             "packs", "parameters", "per_sample", "shifted", "tied"))}
LONGEST = 400  # lines


def modules(folder: Path) -> set[str]:
    return {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.py")}


def test_both_front_ends_have_the_same_modules():
    keras_only = {name for name in modules(FRONT_ENDS["tensorflow"]) if name.startswith("keras/")}
    assert keras_only
    assert modules(FRONT_ENDS["tensorflow"]) - keras_only - TENSORFLOW_ALONE == \
        modules(FRONT_ENDS["torch"]) - TORCH_ALONE
    assert modules(FRONT_ENDS["torch"]) >= TORCH_ALONE


def test_reducers_have_the_same_classes_and_hooks():
    """A class of one front end's ``reducers/`` or ``seng/`` is in the file of that name of the other."""
    def classes(path: Path) -> set[str]:
        return {node.name for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}

    for name in ("base", "plain", "buckets", "feedback", "delay", "topk", "powersgd", "late"):
        here, there = (classes(folder / "reducers" / f"{name}.py") for folder in FRONT_ENDS.values())
        shared = {one for one in here | there if one.endswith("Reducer")}
        assert shared, name
        assert shared <= here & there, name
    for name, expected in {"__init__": "SENG", "system": "LayerSystem", "capture": "Capture",
                           "inventory": "Layer", "rules": "Factors"}.items():
        assert all(expected in classes(folder / "seng" / f"{name}.py")
                   for folder in FRONT_ENDS.values()), name
    blocks = [classes(folder / "seng" / "blocks.py") for folder in FRONT_ENDS.values()]
    assert all({"Block", "Explicit", "Product"} <= one for one in blocks)


@pytest.mark.parametrize("folder", ["hvd_ext", "torch_ext", "tf", "benchmarks", "examples"])
def test_no_file_has_grown_too_long(folder):
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines())
               for path in (ROOT / folder).rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}

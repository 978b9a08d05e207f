"""The public names of the front ends' modules, read from their sources: ``python -m scripts.public_names``.

A module's names are the literal strings of its ``__all__``. Without one they are the functions and classes
that it defines and, in a package, the names that it imports from this package; a name with an underscore in
front is private. Names that a module only hands on from Horovod do not count.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Import names and folders, as in setup.py; the longest first.
FOLDERS = {"hvd_ext.torch": "torch_ext", "hvd_ext.tensorflow": "tf", "hvd_ext": "hvd_ext"}
MODULES = (
    "hvd_ext.torch", "hvd_ext.torch.elastic", "hvd_ext.torch.lightning", "hvd_ext.torch.seng.schedules",
    "hvd_ext.tensorflow", "hvd_ext.tensorflow.elastic", "hvd_ext.tensorflow.seng.schedules",
    "hvd_ext.tensorflow.keras", "hvd_ext.tensorflow.keras.callbacks", "hvd_ext.tensorflow.keras.elastic",
    "hvd_ext.async_ps.numpy",
)
TOOLS = {"via_float32", "reduce_gradients"}  # for the modules themselves


def module_file(module: str) -> Path | None:
    """The source of a module of this package, or None where there is no such module."""
    for package, folder in FOLDERS.items():
        if module == package or module.startswith(f"{package}."):
            path = ROOT.joinpath(folder, *module.removeprefix(package).strip(".").split("."))
            candidates = (path / "__init__.py", path.parent / f"{path.name}.py")
            return next((file for file in candidates if file.is_file()), None)
    return None


def public_names(module: str) -> list[str]:
    """A module's public names, sorted.

    Raises:
        ValueError: there is no such module.
    """
    file = module_file(module)
    if file is None:
        raise ValueError(f"there is no module {module}")
    tree = ast.parse(file.read_text())
    listed, bound = set[str](), set[str]()
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(_is_name(target, "__all__") for target in node.targets):
            listed |= {one.value for one in ast.walk(node.value)
                       if isinstance(one, ast.Constant) and isinstance(one.value, str)
                       and one.value not in ("", "_")}
        elif (isinstance(node, ast.ImportFrom) and str(node.module).startswith("hvd_ext")
              and file.name == "__init__.py"):
            bound |= {alias.asname or alias.name for alias in node.names
                      if module_file(f"{node.module}.{alias.name}") is None}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
    return sorted(name for name in (listed or bound) - TOOLS if not name.startswith("_"))


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def find_definition(module: str, name: str) -> tuple[Path, ast.FunctionDef | ast.ClassDef | None]:
    """Where a public name is defined, through imports within this package.

    Returns:
        The file, and its function or class; None where the name is a constant or Horovod's.

    Raises:
        ValueError: the name is not bound in the module.
    """
    file = module_file(module)
    assert file is not None
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return file, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    here = str(node.module).startswith("hvd_ext")
                    return find_definition(str(node.module), alias.name) if here else (file, None)
        if isinstance(node, ast.Assign) and any(_is_name(target, name) for target in node.targets):
            return file, None
    raise ValueError(f"{module} has no {name}")


if __name__ == "__main__":
    for one in MODULES:
        print(f"{one}: {', '.join(public_names(one))}")

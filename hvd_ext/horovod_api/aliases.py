"""Horovod's modules and names under ours: ``hvd_ext.torch.functions`` is ``horovod.torch.functions``.

A script that imports ``horovod.X`` anywhere runs with ``hvd_ext.X`` in its place. A module of ours wins over
Horovod's of the same name, and hands on the names that it does not have.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

Lookup = Callable[[str], Any]
RENAMED = {"Late": "DelayedUpdate", "uneven": "uneven_inputs"}  # names of ours in earlier versions


def alias_package(package: str, target: str) -> Lookup:
    """Let ``package.X`` be ``target.X``, the same module object, where the package has no module X.

    Args:
        package: one of ours, such as "hvd_ext.torch".
        target: Horovod's, such as "horovod.torch". Nothing of it is imported before it is asked for.

    Returns:
        What to assign to the package's ``__getattr__``; see :func:`module_getattr`.
    """
    _get_finder().targets[package] = target
    return module_getattr(package, target)


def offer_packages(package: str, target: str, packages: Sequence[str], names: Sequence[str]) -> Lookup:
    """Let ``package.X`` be ``target.X`` for these packages X and names of ``target``, and for nothing else.

    For a package of ours beside Horovod's front ends, which must not hand out ``horovod.torch`` as its own.
    """
    found = _get_finder()
    found.packages.update({f"{package}.{name}": f"{target}.{name}" for name in packages})

    def lookup(name: str) -> Any:
        if name in packages:
            return importlib.import_module(f"{package}.{name}")
        if name in names:
            return getattr(importlib.import_module(target), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return lookup


def module_getattr(module: str, target: str) -> Lookup:
    """A module's ``__getattr__`` that hands on to Horovod's ``target``, underscore names included.

    A module of ours that has modules of Horovod's below it says ``__path__ = []`` as well.
    """
    def lookup(name: str) -> Any:
        dunder = name.startswith("__") and name.endswith("__")
        path = getattr(sys.modules[module], "__path__", None) if not dunder else None
        # Ours is meant, also where it is asked for while the package is being imported.
        if path and PathFinder.find_spec(f"{module}.{name}", path) is not None:
            return importlib.import_module(f"{module}.{name}")
        if not dunder:
            horovods = importlib.import_module(target)
            if hasattr(horovods, name):
                return getattr(horovods, name)
        new = f"; it is {RENAMED[name]} now" if name in RENAMED else f", nor has {target!r}"
        raise AttributeError(f"module {module!r} has no attribute {name!r}{new}")

    return lookup


class _Aliases(MetaPathFinder):
    """Finds ``hvd_ext.torch.X`` as ``horovod.torch.X``.

    Attributes:
        targets: by package of ours, where modules are that it lacks.
        packages: by name under ours, the whole package that is meant.
    """

    def __init__(self) -> None:
        self.targets: dict[str, str] = {}
        self.packages: dict[str, str] = {}

    def find_spec(self, fullname: str, path: Sequence[str] | None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        for package, horovods in self.targets.items():
            if fullname.startswith(f"{package}."):
                return self._alias_spec(fullname, horovods + fullname[len(package):], path)
        for package, horovods in self.packages.items():
            if f"{fullname}.".startswith(f"{package}."):
                return self._alias_spec(fullname, horovods + fullname[len(package):], path)
        return None

    @staticmethod
    def _alias_spec(fullname: str, name: str, path: Sequence[str] | None) -> ModuleSpec | None:
        parent = fullname.rpartition(".")[0]
        aliased = parent in sys.modules and sys.modules[parent].__name__ != parent
        # Modules of ours win; below a package of Horovod's a second copy would be loaded.
        if not aliased and PathFinder.find_spec(fullname, path) is not None:
            return None
        found = _find_spec(name)
        if found is None:
            return None
        return ModuleSpec(fullname, _Same(fullname, name), origin=found.origin,
                          is_package=found.submodule_search_locations is not None)


def _get_finder() -> _Aliases:
    for finder in sys.meta_path:
        if isinstance(finder, _Aliases):
            return finder
    finder = _Aliases()
    sys.meta_path.insert(0, finder)
    return finder


class _Same(Loader):
    """Loads the module of that name, and leaves what it says of itself as it is."""

    def __init__(self, alias: str, name: str) -> None:
        self._alias = alias
        self._name = name
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        try:
            module = importlib.import_module(self._name)
        except ImportError as error:
            raise type(error)(
                f"{self._alias} is {self._name}, and `import {self._name}` fails here: {error}. Install the "
                "missing package; a training script needs no more than hvd_ext.torch, hvd_ext.tensorflow or "
                "hvd_ext.tensorflow.keras", name=error.name) from error
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import machinery has put the alias's there


def _find_spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a package above it is not there
        return None

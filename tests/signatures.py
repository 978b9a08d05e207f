"""How a module's public callables differ from Horovod's, as a script that calls them would notice."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

CALLED_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def differences(theirs: ModuleType, ours: ModuleType) -> dict[str, str]:
    """For each public callable of Horovod's module that is not the same object in ours: what differs."""
    found = {}
    for name, their, our in _pairs(theirs, ours):
        problem = _problem(their, our)
        if problem:
            found[f"{theirs.__name__}.{name}"] = problem
    return found


def modules_below(package: str, left_out: tuple[str, ...] = ()) -> list[str]:
    """The names of a package of Horovod's and of all modules below it."""
    module = importlib.import_module(package)
    return [package, *(found.name for found in pkgutil.walk_packages(module.__path__, package + ".")
                       if not found.name.endswith(left_out))]


def compared(theirs: ModuleType, ours: ModuleType) -> list[str]:
    """The names of the callables that ``differences`` looks at."""
    return [name for name, _, _ in _pairs(theirs, ours)]


def _pairs(theirs: ModuleType, ours: ModuleType) -> Iterator[tuple[str, Any, Any]]:
    for name, their in vars(theirs).items():
        if name.startswith("_") or not callable(their) or not _horovods(their):
            continue
        our = getattr(ours, name)
        if our is their:
            continue
        if not inspect.isclass(their):
            yield name, their, our
            continue
        yield name, their.__init__, _constructor(our)
        for method, function in vars(their).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                yield f"{name}.{method}", function, getattr(our, method, None)


def _horovods(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("horovod")


def _constructor(our: Any) -> Any:
    return our.__init__ if inspect.isclass(our) else our


def _parameters(function: Any) -> list[inspect.Parameter]:
    # ``self`` counts for nothing: a function may stand for a class.
    return [one for one in inspect.signature(function).parameters.values() if one.name != "self"]


def _problem(their: Any, our: Any) -> str | None:
    if our is None:
        return "is missing"
    wanted, got = _parameters(their), _parameters(our)
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in got)
    fixed = [one for one in wanted if one.kind in CALLED_BY_NAME]
    if not fixed and any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in wanted):
        return None  # Horovod's passes on whatever it is given
    for number, one in enumerate(fixed):
        if number >= len(got) or (got[number].name, got[number].kind) != (one.name, one.kind):
            return f"parameter {number} is {one}, ours are {list(map(str, got))}"
        if not _same(got[number].default, one.default):
            return f"the default of {one.name} is {one.default!r}, ours {got[number].default!r}"
    for one in got[len(fixed):]:
        if one.kind in CALLED_BY_NAME and one.default is one.empty and not open_ended:
            return f"ours needs {one.name} too"
    if inspect.isfunction(their) and inspect.isfunction(our):
        return _defaults_problem(their, our)
    return None


def _defaults_problem(their: Any, our: Any) -> str | None:
    wanted, got = their.__defaults__ or (), our.__defaults__ or ()
    if len(got) < len(wanted) or not all(map(_same, got, wanted)):
        return f"__defaults__ is {wanted}, ours {got}"
    missing = (their.__kwdefaults__ or {}).keys() - (our.__kwdefaults__ or {}).keys()
    return f"__kwdefaults__ lacks {missing}" if missing else None


def _same(one: Any, other: Any) -> bool:
    return one is other or bool(one == other)

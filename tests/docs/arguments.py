"""What public calls take: ``python -m tests.docs.arguments MODULES CALLS`` prints it as JSON.

MODULES has commas between them, CALLS is a JSON list of names in the first module that has them. Printed is,
for each call, a dict from argument to the source of its default, or to null where it has none.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from typing import Any


def arguments_of(call: Callable[..., Any]) -> dict[str, str | None]:
    """Those of a function, or of a class; ``**settings`` of a constructor are its base classes'."""
    found: dict[str, str | None] = {}
    for one in [base.__init__ for base in call.__mro__] if _passes_on(call) else [call]:
        parameters = inspect.signature(one).parameters
        for name, parameter in parameters.items():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != "self":
                found.setdefault(name, _source(call, parameter))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return found


def _passes_on(call: Any) -> bool:
    return inspect.isclass(call) and any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(call).parameters.values())


def _source(call: Any, parameter: inspect.Parameter) -> str | None:
    if parameter.default is parameter.empty:
        return None
    if dataclasses.is_dataclass(call):
        made = {field.name: field.default_factory for field in dataclasses.fields(call)}.get(parameter.name)
        if made is not None and made is not dataclasses.MISSING:
            return repr(made())
    return repr(parameter.default)


if __name__ == "__main__":
    modules = [importlib.import_module(name) for name in sys.argv[1].split(",")]
    calls: dict[str, Any] = {}
    for name in json.loads(sys.argv[2]):
        first, *further = name.split(".")
        found: Any = next(getattr(module, first) for module in modules if hasattr(module, first))
        for part in further:
            found = getattr(found, part)
        calls[name] = arguments_of(found)
    print(json.dumps(calls))

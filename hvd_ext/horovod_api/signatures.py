"""Functions in place of Horovod's that take the same arguments and have the same defaults.

Scripts call Horovod's functions with keywords, and some libraries change their ``__defaults__``. A function
of ours that only passes its arguments on must allow both.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Function = Callable[..., Any]


def copy_signature(model: Function, decorate: Callable[[Function], Function] = lambda function: function
                   ) -> Callable[[Function], Function]:
    """Let a function that takes keywords only be called as ``model`` is.

    ::

        @copy_signature(horovod.broadcast)
        def broadcast(**arguments): ...          # every argument under its name, defaults filled in

    Its ``__defaults__`` and ``__kwdefaults__`` are those of ``model``, and are read at every call: whoever
    assigns to them changes the defaults, as for any function.

    Args:
        model: a function without positional-only parameters and ``*args``; a ``**options`` of its own is
            passed on.
        decorate: applied to the result before it gets its defaults.

    Returns:
        A decorator.
    """
    signature = inspect.signature(model)
    parameters = signature.parameters.values()
    positional = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    options = next((one.name for one in parameters if one.kind is one.VAR_KEYWORD), None)
    fixed = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    assert len(fixed) + (options is not None) == len(signature.parameters), model

    def replace(function: Function) -> Function:
        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            defaults: tuple[Any, ...] = public.__defaults__ or ()
            arguments = dict(zip(positional[len(positional) - len(defaults):], defaults, strict=True))
            arguments.update(public.__kwdefaults__ or {})
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise TypeError(f"{model.__name__}() {error}") from None
            arguments.update(given)
            further = arguments.pop(options, {}) if options else {}
            return function(**arguments, **further)

        public = decorate(call)
        public.__defaults__ = getattr(model, "__defaults__", None)
        public.__kwdefaults__ = getattr(model, "__kwdefaults__", None)
        return public

    return replace


def set_default_name(function: Function, name: str) -> Function:
    """A function of Horovod's whose collective is called ``name`` unless the caller names it."""
    @copy_signature(function)
    def call(**arguments: Any) -> Any:
        return function(**{**arguments, "name": arguments["name"] or name})

    return call


def refuse_old_names(**renamed: str) -> Callable[[Function], Function]:
    """Let a function say which argument to use where one of an earlier version is given.

    Args:
        renamed: by the old name, the new one.

    Returns:
        A decorator. The function raises a TypeError for an old name.
    """
    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call_with_new_names(*args: Any, **kwargs: Any) -> Any:
            check_old_names(function.__qualname__.removesuffix(".__init__"), kwargs, renamed)
            # Some libraries change a function's defaults.
            inner.__defaults__, inner.__kwdefaults__ = call.__defaults__, call.__kwdefaults__
            return function(*args, **kwargs)

        call: Any = call_with_new_names
        inner: Any = function
        call.__defaults__, call.__kwdefaults__ = inner.__defaults__, inner.__kwdefaults__
        return call_with_new_names

    return decorate


def check_old_names(function: str, given: Iterable[str], renamed: Mapping[str, str]) -> None:
    """Refuse arguments of an earlier version.

    Raises:
        TypeError: one of ``given`` has been renamed; with its new name.
    """
    for name in given:
        if name in renamed:
            raise TypeError(f"{function}() has no argument {name}=; it is {renamed[name]} now")

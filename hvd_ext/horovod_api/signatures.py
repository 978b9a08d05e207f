"""Functions in place of Horovod's that take the same arguments and have the same defaults.

Scripts call Horovod's functions with keywords, and some libraries change their ``__defaults__``. A function
of ours that only passes its arguments on must allow both.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
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

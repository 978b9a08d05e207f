"""Hooks: which parameters may have one, how they are taken off again, and module hooks that are not saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hvd_ext.torch.backward_pass_tracker import BackwardPassTracker
from hvd_ext.torch.collectives import keep_alive_until_done
from hvd_ext.torch.reducers.base import NamedParameter, Reducer


def check_real(entries: Sequence[NamedParameter], method: str) -> None:
    """Refuse complex parameters: a method would lose their imaginary part, or fail.

    Args:
        method: what the optimizer was given, as a user wrote it.

    Raises:
        ValueError: one is complex; names the first.
    """
    for entry in entries:
        if entry.parameter.is_complex():
            raise ValueError(
                f"{entry.name} is a parameter of {entry.parameter.dtype}, which {method} cannot take: "
                "Horovod adds up real numbers. Make a real parameter of it, as torch.view_as_real(value) "
                "has it, and use torch.view_as_complex(parameter) in the model; or freeze it")


def remove_hooks(hooks: dict[torch.Tensor, Any]) -> None:
    """Take the hooks off their parameters."""
    for handle in hooks.values():
        handle.remove()


def let_go(hooks: dict[torch.Tensor, Any], reducer: Reducer, passes: BackwardPassTracker) -> None:
    """The optimizer is gone: its hooks go, and its messages in flight, once they have arrived.

    Nobody gets their names while they may be in flight.
    """
    remove_hooks(hooks)
    pending = reducer.pending_handles()
    keep_alive_until_done(pending)
    scope = reducer.collectives.scope
    if scope is not None and (pending or passes.reported):
        scope.leave_behind()


class ModuleHook:
    """A module hook that belongs to this process: pickled or copied it is one that does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _make_ignoring_hook, ()


def ignore_call(*_args: Any, **_kwargs: Any) -> None:
    """A module hook without effect: what a :class:`ModuleHook` is in a file."""


def _make_ignoring_hook() -> Callable[..., None]:
    return ignore_call

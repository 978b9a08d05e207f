"""Copies and pickles of a distributed optimizer: the optimizer that was wrapped, without the ranks.

Hooks, messages under way and this rank's part of the extensions cannot be in two places. So
``copy.deepcopy(optimizer)`` and ``pickle`` give the wrapped optimizer's own class with its parameters and
state, as they do for that optimizer; training on is from ``optimizer.state_dict()``.
"""

from __future__ import annotations

import copyreg
from typing import Any

OWN = ("_hvd_ext", "_synchronized", "_should_synchronize")


def wrapped_class(optimizer: Any) -> type:
    """The class of the optimizer that a distributed one was made from: the last of its bases."""
    return type(optimizer).__bases__[-1]


def reduce_wrapped(optimizer: Any, protocol: Any) -> Any:
    """``__reduce_ex__`` of a distributed optimizer.

    Raises:
        TypeError: moments of parameters belong to other ranks, so that this one has no whole optimizer.
    """
    ours = getattr(optimizer, "_hvd_ext", None)
    if ours is not None and ours.server is not None and not ours.server.alone:
        raise TypeError(
            f"an optimizer with server={ours.server.where!r} cannot be copied or pickled: the moments of "
            "some parameters are on other ranks only; save optimizer.gather_state_dict(), which every "
            "rank calls")
    plain = wrapped_class(optimizer).__new__(wrapped_class(optimizer))
    # A scheduler has put a step of its own into the instance, which belongs to the original.
    plain.__dict__.update({key: value for key, value in vars(optimizer).items()
                           if key not in OWN and key != "step"})
    make, arguments, *rest = plain.__reduce_ex__(protocol)
    # pickle insists that what __newobj__ makes is of the class of what it was given.
    return _new_instance if make is copyreg.__newobj__ else make, arguments, *rest  # type: ignore[attr-defined]


def _new_instance(cls: Any, *arguments: Any) -> Any:
    return cls.__new__(cls, *arguments)


def copy_as_wrapped(optimizer: Any) -> Any:
    """Let Horovod's own distributed optimizer be copied and pickled so too; it is returned."""
    type(optimizer).__reduce_ex__ = reduce_wrapped  # Horovod makes a class for every optimizer
    return optimizer

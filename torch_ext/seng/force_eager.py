"""A compiled model runs uncompiled on a refresh step: compiled code does not see hooks that come later."""

from __future__ import annotations

import weakref
from typing import Any

import torch

_HELD: set[int] = set()
_STANCE: list[Any] = []


class ForceEagerGuard:
    """While any of these is held, all code under ``torch.compile`` in this process runs as it is written.

    What was compiled stays compiled, and is used again as soon as the last one lets go.
    """

    def __init__(self) -> None:
        weakref.finalize(self, _release_number, id(self))

    def force_eager(self) -> None:
        """Run uncompiled from here on."""
        _HELD.add(id(self))
        if not _STANCE:
            _STANCE.append(torch.compiler.set_stance("force_eager"))

    def allow_compiled(self) -> None:
        """Allow compiled code again."""
        _release_number(id(self))


def _release_number(number: int) -> None:
    _HELD.discard(number)
    if _STANCE and not _HELD:
        _STANCE.pop().__exit__(None, None, None)

"""Numba, where it is installed and fits the installed NumPy."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Loop = TypeVar("Loop", bound=Callable[..., Any])

BLOCK_NUMEL = 2048
"""Elements that loops of several passes take at a time: six arrays of them stay in a first-level cache."""

PROBLEM: str | None = None
"""Why there is no Numba; None where there is."""

# With colorama installed Numba has it write an escape code at the end of every rank's log.
_PLAIN_ERRORS = "NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING"
_given = os.environ.get(_PLAIN_ERRORS)
os.environ[_PLAIN_ERRORS] = _given or "1"
numba: Any = None  # its types are not those of a checker's machine, which may not have it
try:
    numba = importlib.import_module("numba")
    importlib.import_module("numba.extending")
except ImportError as error:  # also where it is installed and refuses this NumPy
    PROBLEM = str(error)
if _given is None:
    del os.environ[_PLAIN_ERRORS]


def compile_loop(loop: Loop) -> Loop:
    """The loop, compiled for the types of its first call; as it is without Numba.

    Nothing is reordered and no product is merged with a sum but where ``fma`` says so, so that results are
    the same bits on every machine. The GIL is released. What was compiled is kept in ``__pycache__``, or in
    the user's cache where that cannot be written.
    """
    if PROBLEM is not None:
        return loop
    options = {"nogil": True, "error_model": "numpy", "fastmath": False}
    try:
        made: Loop = numba.njit(cache=True, **options)(loop)
    except RuntimeError as error:  # no folder in which anything could be kept
        warnings.warn(f"kernels are compiled anew by every process ({error}); set NUMBA_CACHE_DIR to a "
                      "folder that can be written", stacklevel=2)
        made = numba.njit(**options)(loop)
    return made


if numba is not None:
    @numba.extending.intrinsic  # type: ignore[untyped-decorator]
    def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
        """``a * b + c``, rounded once, as PyTorch's vectorised ``addcmul`` and ``add(alpha=)`` do."""
        return a(a, b, c), lambda context, builder, signature, arguments: builder.fma(*arguments)

    @numba.extending.intrinsic  # type: ignore[untyped-decorator]
    def _to_pointer(typing: Any, address: Any) -> Any:
        def cast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return numba.types.voidptr(numba.types.intp), cast

    @numba.njit  # type: ignore[untyped-decorator]
    def array_at(address: Any, size: Any, like: Any) -> Any:
        """The ``size`` elements from an address on, of an array's dtype."""
        return numba.carray(_to_pointer(address), size, like.dtype)
else:
    def fma(a: Any, b: Any, c: Any) -> Any:
        """``a * b + c``."""
        return a * b + c

    def array_at(address: Any, size: Any, like: Any) -> Any:
        """Only compiled loops read from addresses."""
        raise ImportError(f"needs Numba: {PROBLEM}")


def row_addresses(rows: list[NDArray[Any]]) -> NDArray[np.intp]:
    """Where rows begin in memory, (M,), for loops over any number of them."""
    return np.array([row.ctypes.data for row in rows], dtype=np.intp)

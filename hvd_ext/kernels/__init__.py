"""Loops that pass over memory once, compiled by Numba where it is installed (the extra ``fast``).

PyTorch's CPU tensors are NumPy arrays as well, so that the front end and the parameter server share the
loops. The plain way, PyTorch's or NumPy's own operations, is what tests compare with. It is taken without
Numba, under ``HVD_EXT_KERNELS=plain``, and for what the loops do not take (half precision, other strides).
"""

from __future__ import annotations

import os

VARIABLE = "HVD_EXT_KERNELS"
CHOICES = ("auto", "plain", "triton")


def kernel_choice() -> str:
    """What ``HVD_EXT_KERNELS`` says: "auto", the default, "plain", or "triton": on CUDA tensors too.

    Raises:
        ValueError: it says something else.
    """
    said = os.environ.get(VARIABLE) or CHOICES[0]
    if said not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {said!r}; leave it unset "
                         "for compiled kernels where Numba is installed")
    return said


def kernels_usable() -> bool:
    """Whether the compiled loops are to be used; the first call imports Numba."""
    if kernel_choice() == "plain":
        return False
    from hvd_ext.kernels import compiler

    return compiler.PROBLEM is None

"""What the letters of an ``EinsumDense`` equation stand for in the gradient of its kernel."""

from __future__ import annotations

import functools
import string
from dataclasses import dataclass


@dataclass(frozen=True)
class AxisRoles:
    """The letters of ``x,kernel->z``, the first of x and z the sample.

    ``summed`` are n_A's, in x and the kernel, ``made`` n_G's, in the kernel and z, ``between`` those of the
    positions, kappa, in x and z. ``order`` says whether the gradient is a product of factors: the kernel has
    "summed" before "made", or "made" before "summed"; None where it has neither, or its letters are
    in x and z too.
    """

    x: str
    kernel: str
    z: str
    summed: str
    made: str
    between: str
    order: str | None


@functools.cache
def axis_roles(equation: str, rank: int) -> AxisRoles:
    """The roles in ``equation`` for an x of ``rank`` axes, the ellipsis written out."""
    x, kernel, z = equation.replace(" ", "").replace("->", ",").split(",")
    if "..." in x:
        free = [letter for letter in string.ascii_letters if letter not in equation]
        more = "".join(free[:rank - len(x) + len("...")])
        x, z = x.replace("...", more), z.replace("...", more)
    summed = "".join(letter for letter in kernel if letter in x and letter not in z)
    made = "".join(letter for letter in kernel if letter in z and letter not in x)
    between = "".join(letter for letter in x[1:] if letter in z and letter not in kernel)
    order = {summed + made: "summed", made + summed: "made"}.get(kernel)
    if set(x[1:]) - set(summed + between) or set(z[1:]) - set(made + between):
        order = None
    return AxisRoles(x, kernel, z, summed, made, between, order)

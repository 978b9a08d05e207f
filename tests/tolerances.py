"""How far apart two computations of one value may be for no other reason than rounding."""

from __future__ import annotations

from typing import Any

# Unit roundoffs u: the relative error of one operation rounded to nearest.
UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def rounding_tolerance(dtype: Any, operations: int, magnitude: float = 1.0) -> float:
    """The largest absolute difference that rounding explains between two computations of one value.

    A sum of products that takes n roundings on the longest way from an input to the result is within
    gamma_n * sum |terms| of the exact one, gamma_n = n u / (1 - n u), whatever the order of its terms and
    whether products and sums are fused: Higham, Accuracy and Stability of Numerical Algorithms, 2nd
    edition, lemma 3.1, eq. 3.5 and 3.13. Two such computations differ by at most twice as much. The bound
    is absolute: where terms cancel, no relative one holds.

    Args:
        dtype: what is computed in, by name or as a dtype of NumPy, PyTorch or TensorFlow.
        operations: n. A sum of k terms takes k - 1, a product of vectors of k entries k, a division one.
            Count 4 for each exp, tanh, rsqrt or logarithm: vector libraries promise no more than 4 units.
            Inputs that are stored in a narrower dtype are inputs, not roundings.
        magnitude: the largest sum of the absolute values of the terms, not the result's absolute value.
    """
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).split(".")[-1]
    if name not in UNITS:
        raise ValueError(f"dtype must be one of {', '.join(UNITS)}, got {dtype!r}")
    n_u = operations * UNITS[name]
    if not 0 < n_u < 0.1:
        raise ValueError(f"{operations} roundings in {name} bound nothing; compare in a wider dtype")
    return 2 * n_u / (1 - n_u) * float(magnitude)

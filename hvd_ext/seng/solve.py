"""How a small system that will not factor is helped: the ladder of jitters."""

from __future__ import annotations

JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)


def jitter_sequence(mean_diagonal: float) -> tuple[float, ...]:
    """What is added to the diagonal of ``lam I + U^T U``, in this order, until Cholesky succeeds.

    Relative to the mean of the diagonal of ``U^T U``; the first is 0. When the last one fails too
    the layer keeps its previous curvature.
    """
    return tuple(jitter * mean_diagonal for jitter in JITTERS)

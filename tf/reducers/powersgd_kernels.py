"""What PowerSGD computes on tensors. No collectives, no state.

Shapes: D (n, m) one gradient matrix, P (n, r), Q (m, r), r the rank. A bucket's matrices, all P and
all Q are flat tensors with the places of :class:`hvd_ext.powersgd.Matrix`.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from hvd_ext.powersgd import Matrix


def left_factors(total: tf.Tensor, q: tf.Tensor, found: Sequence[Matrix]) -> tf.Tensor:
    """``P <- D Q`` of all matrices, flat (Vogels et al., Algorithm 1, line 3)."""
    return _together([tf.matmul(_matrix(total, one), _q(q, one)) for one in found])


def orthogonalize(p: tf.Tensor, found: Sequence[Matrix]) -> tf.Tensor:
    """Every P with orthonormal columns, flat (Algorithm 1, line 5)."""
    return _together([tf.linalg.qr(_p(p, one)).q for one in found])


def right_factors(total: tf.Tensor, p: tf.Tensor, found: Sequence[Matrix]) -> tf.Tensor:
    """``Q <- D^T P`` of all matrices, flat (Algorithm 1, line 6)."""
    return _together([tf.matmul(_matrix(total, one), _p(p, one), transpose_a=True) for one in found])


def expand(p: tf.Tensor, q: tf.Tensor, found: Sequence[Matrix]) -> tf.Tensor:
    """``P Q^T`` of all matrices, flat (Algorithm 2, line 9)."""
    return _together([tf.matmul(_p(p, one), _q(q, one), transpose_b=True) for one in found])


def _matrix(flat: tf.Tensor, one: Matrix) -> tf.Tensor:
    return tf.reshape(one.slot.of(flat), (one.n, one.m))


def _p(flat: tf.Tensor, one: Matrix) -> tf.Tensor:
    return tf.reshape(one.p.of(flat), (one.n, one.r))


def _q(flat: tf.Tensor, one: Matrix) -> tf.Tensor:
    return tf.reshape(one.q.of(flat), (one.m, one.r))


def _together(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.concat([tf.reshape(part, [-1]) for part in parts], axis=0)

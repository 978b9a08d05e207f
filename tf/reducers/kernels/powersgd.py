"""What PowerSGD computes on tensors. No collectives, no state.

Shapes: D (n, m) one gradient matrix, P (n, r), Q (m, r), r the rank. A bucket's matrices, all P and
all Q are flat tensors with the places of :class:`hvd_ext.reducers.powersgd.Matrix`.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from hvd_ext.reducers.powersgd import Matrix


def left_factors(total: tf.Tensor, q: tf.Tensor, found: Sequence[Matrix]) -> tf.Tensor:
    """``P <- D Q`` of all matrices, flat (Vogels et al., Algorithm 1, line 3)."""
    return _concat_flat([tf.matmul(_matrix_at(total, one), _q_at(q, one)) for one in found])


def orthogonalize_columns(p: tf.Tensor, found: Sequence[Matrix]) -> tf.Tensor:
    """Every P with orthonormal columns, flat (Algorithm 1, line 5)."""
    return _concat_flat([tf.linalg.qr(_p_at(p, one)).q for one in found])


def right_factors(total: tf.Tensor, p: tf.Tensor, found: Sequence[Matrix]) -> tf.Tensor:
    """``Q <- D^T P`` of all matrices, flat (Algorithm 1, line 6)."""
    return _concat_flat([tf.matmul(_matrix_at(total, one), _p_at(p, one), transpose_a=True) for one in found])


def expand_factors(p: tf.Tensor, q: tf.Tensor, found: Sequence[Matrix]) -> tf.Tensor:
    """``P Q^T`` of all matrices, flat (Algorithm 2, line 9)."""
    return _concat_flat([tf.matmul(_p_at(p, one), _q_at(q, one), transpose_b=True) for one in found])


def _matrix_at(flat: tf.Tensor, one: Matrix) -> tf.Tensor:
    return tf.reshape(one.slot.slice_of(flat), (one.n, one.m))


def _p_at(flat: tf.Tensor, one: Matrix) -> tf.Tensor:
    return tf.reshape(one.p.slice_of(flat), (one.n, one.r))


def _q_at(flat: tf.Tensor, one: Matrix) -> tf.Tensor:
    return tf.reshape(one.q.slice_of(flat), (one.m, one.r))


def _concat_flat(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.concat([tf.reshape(part, [-1]) for part in parts], axis=0)

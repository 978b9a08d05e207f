"""One layer's curvature under SENG: what is held between refreshes, made anew, and used."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_ext.seng import Settings
from hvd_ext.tensorflow import seng_kernels as kernels
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.seng_capture import Layer

Candidate = dict[str, tf.Tensor]
"""Curvature by variable's name, which counts once all ranks have theirs, and whether it is good."""


def held(value: Any, shape: Any = None) -> tf.Variable:
    """A variable of curvature; None in ``shape`` where an extent depends on the batch."""
    with tf.init_scope():
        return tf.Variable(value, trainable=False, shape=shape)


class LayerState(tf.Module, abc.ABC):
    """The small system of a layer and the step it is of; subclasses hold U or its factors."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.gram = held(tf.zeros((0, 0), tf.float64), (None, None))
        self.lower = held(tf.zeros((0, 0), tf.float64), (None, None))
        self.lam = held(tf.constant(0.0, tf.float64))
        self.rho = held(tf.constant(0, tf.int32))
        self.offset = held(tf.constant(0, tf.int32))
        self.ready = held(False)
        self.taken_at = held(tf.constant(-1, tf.int64))
        self.failures = held(tf.constant(0, tf.int64))
        self.previous = held(tf.zeros((0,)), (None,))

    @abc.abstractmethod
    def candidate(self, settings: Settings, step: tf.Variable, now: tf.Variable, lam: tf.Tensor,
                  collectives: Collectives, prefix: str) -> Candidate:
        """Curvature from what this pass captured; all ranks call it alike."""

    @abc.abstractmethod
    def subtracted(self, solved_for: tf.Tensor, settings: Settings, collectives: Collectives,
                   prefix: str) -> tf.Tensor:
        """The mean over ranks of ``U_i b_i`` for a flat gradient, flat (SENG eq. 26)."""

    def commit(self, new: Candidate, step: tf.Variable) -> tf.Tensor:
        """Put a candidate in place."""
        for name, value in new.items():
            if name != "good":
                getattr(self, name).assign(value)
        self.ready.assign(True)
        self.taken_at.assign(step)
        return tf.constant(True)

    def fail(self) -> tf.Tensor:
        """Count a refresh without curvature; what was there stays."""
        self.failures.assign_add(1)
        return tf.constant(True)

    def follow(self, lam: tf.Tensor) -> None:
        """Factor the small system again where the damping has changed."""
        def again() -> tf.Tensor:
            lower, good = kernels.factor(self.gram.read_value(), lam)
            self.lower.assign(tf.cond(good, lambda: lower, lambda: self.lower.read_value()))
            self.lam.assign(lam)
            return tf.constant(True)

        changed = tf.logical_and(self.ready, tf.not_equal(self.lam, lam))
        tf.cond(changed, again, lambda: tf.constant(False))

    def direction(self, g: tf.Tensor, lam: tf.Tensor, settings: Settings,
                  collectives: Collectives, prefix: str) -> tf.Tensor:
        """``(g - U b)/lam`` (SENG eq. 8, 26), b of the former gradient when lagged (eq. 27)."""
        solved_for = g
        if settings.coupling == "lagged":
            solved_for = tf.cond(tf.size(self.previous) > 0, lambda: self.previous.read_value(),
                                 lambda: g)
            solved_for = tf.ensure_shape(solved_for, g.shape)
        mean = self.subtracted(solved_for, settings, collectives, prefix)
        return (g - mean) / tf.cast(lam, g.dtype)

    def remember(self, g: tf.Tensor, good: tf.Tensor) -> None:
        """Keep this step's gradient for the next one (SENG eq. 27)."""
        self.previous.assign(tf.cond(good, lambda: g, lambda: self.previous.read_value()))

    def report(self, step: int) -> dict[str, Any]:
        """What there is to say of the layer."""
        return {"layer": self.layer.name, "kind": self.layer.registered.kind, "n": self.layer.n,
                "rho": int(self.rho), "age": step - int(self.taken_at),
                "failures": int(self.failures), **self.description()}

    @abc.abstractmethod
    def description(self) -> dict[str, Any]:
        """How the curvature is held, and its bytes."""

    def system(self, gram: tf.Tensor, lam: tf.Tensor, fresh: tf.Tensor,
               parts: list[tf.Tensor]) -> Candidate:
        """The small system's part of a candidate; good if it has a factor and ``parts`` are finite."""
        lower, good = kernels.factor(gram, lam)
        for part in parts:
            good = tf.logical_and(good, tf.reduce_all(tf.math.is_finite(part)))
        return {"gram": gram, "lower": lower, "lam": lam, "good": tf.logical_and(good, fresh)}


class ExplicitState(LayerState):
    """U (rho, n) and its sketch Xi (rho, q). ``sketch`` is q or None."""

    def __init__(self, layer: Layer, sketch: int | None) -> None:
        super().__init__(layer)
        self.sketch = sketch
        self.u = held(tf.zeros((0, layer.n)), (None, layer.n))
        self.xi = held(tf.zeros((0, sketch or layer.n)), (None, sketch or layer.n))
        self.rows = held(tf.zeros((sketch or 0,), tf.int64))
        self.weights = held(tf.zeros((sketch or 0,)))

    def candidate(self, settings: Settings, step: tf.Variable, now: tf.Variable, lam: tf.Tensor,
                  collectives: Collectives, prefix: str) -> Candidate:
        layer, ranks = self.layer, collectives.size
        fresh = tf.equal(layer.captured_at, now)
        at = step.read_value()
        (u,) = kernels.scaled(layer.captured.read_value(), settings, at)
        xi, rows, weights = u, self.rows.read_value(), self.weights.read_value()
        if self.sketch is not None:
            scores = row_scores(tf.reduce_sum(u * u, axis=0), settings, collectives,
                                f"{prefix}.scores/{layer.name}")
            rows, weights = kernels.choose_rows(layer.n, self.sketch, scores, settings, at,
                                                f"{layer.name}/rows")
            xi = tf.gather(u, rows, axis=1) * weights
        offset = tf.constant(0)
        divisor = 1
        if settings.coupling == "full" and ranks > 1:
            counts = collectives.allgather(tf.shape(u)[:1], f"{prefix}.rho/{layer.name}")
            offset = tf.reduce_sum(counts[:collectives.rank])
            xi = collectives.allgather(xi, f"{prefix}.xi/{layer.name}")
            divisor = ranks
        gram = tf.cast(tf.matmul(xi, xi, transpose_b=True), tf.float64) / divisor
        return {"u": u, "xi": xi, "rows": rows, "weights": weights, "offset": offset,
                "rho": tf.shape(u)[0], **self.system(gram, lam, fresh, [u])}

    def subtracted(self, solved_for: tf.Tensor, settings: Settings, collectives: Collectives,
                   prefix: str) -> tf.Tensor:
        seen = solved_for
        if self.sketch is not None:
            seen = tf.gather(solved_for, self.rows) * self.weights
        ranks = collectives.size if settings.coupling == "full" else 1
        rhs = tf.linalg.matvec(self.xi.read_value(), seen) / float(np.sqrt(ranks))
        b = kernels.coefficients(self.lower.read_value(), rhs)
        own = b[self.offset:self.offset + self.rho]
        message = tf.linalg.matvec(self.u.read_value(), own, transpose_a=True)
        message = tf.ensure_shape(message * float(np.sqrt(ranks)), solved_for.shape)
        return collectives.if_many(
            lambda: collectives.allreduce(message, f"{prefix}.uc/{self.layer.name}"),
            lambda: message)

    def description(self) -> dict[str, Any]:
        tensors = [self.u, self.xi, self.lower] if self.sketch else [self.u, self.lower]
        return {"held": "explicit", "sketch": self.sketch, "bytes": bytes_of(tensors)}


def bytes_of(tensors: list[tf.Variable]) -> int:
    """Bytes of all elements."""
    return sum(int(tf.size(tensor)) * tensor.dtype.size for tensor in tensors)


def row_scores(squares: tf.Tensor, settings: Settings, collectives: Collectives,
               name: str) -> tf.Tensor | None:
    """What leverage sampling goes by; of all ranks together when they must choose the same rows."""
    if settings.sketch != "leverage":
        return None
    if settings.coupling != "full":
        return squares
    return collectives.if_many(lambda: collectives.allreduce(squares, name), lambda: squares)

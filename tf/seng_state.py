"""One layer's curvature under SENG: what is held between refreshes, made anew, and used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_ext.seng import Settings
from hvd_ext.tensorflow import seng_kernels as kernels
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.seng_capture import Layer


@dataclass
class Candidate:
    """Curvature that counts once all ranks have theirs; ``offset`` of this rank's samples in Xi."""

    u: tf.Tensor
    xi: tf.Tensor
    rows: tf.Tensor
    weights: tf.Tensor
    gram: tf.Tensor
    lower: tf.Tensor
    lam: tf.Tensor
    offset: tf.Tensor
    good: tf.Tensor


class LayerState(tf.Module):
    """U (rho, n), its sketch Xi, and the factor of the small system. ``sketch`` is q or None."""

    def __init__(self, layer: Layer, sketch: int | None) -> None:
        super().__init__()
        self.layer = layer
        self.sketch = sketch
        q = 0 if sketch is None else sketch

        def variable(value: Any, shape: Any = None) -> tf.Variable:
            return tf.Variable(value, trainable=False, shape=shape)

        with tf.init_scope():
            self.u = variable(tf.zeros((0, layer.n)), (None, layer.n))
            self.xi = variable(tf.zeros((0, sketch or layer.n)), (None, sketch or layer.n))
            self.rows = variable(tf.zeros((q,), tf.int64))
            self.weights = variable(tf.zeros((q,)))
            self.gram = variable(tf.zeros((0, 0), tf.float64), (None, None))
            self.lower = variable(tf.zeros((0, 0), tf.float64), (None, None))
            self.lam = variable(tf.constant(0.0, tf.float64))
            self.offset = variable(tf.constant(0, tf.int32))
            self.ready = variable(False)
            self.taken_at = variable(tf.constant(-1, tf.int64))
            self.failures = variable(tf.constant(0, tf.int64))
            self.previous = variable(tf.zeros((0,)), (None,))

    def candidate(self, settings: Settings, step: tf.Variable, now: tf.Variable, lam: tf.Tensor,
                  collectives: Collectives, prefix: str) -> Candidate:
        """Curvature from what this pass captured; all ranks call it alike."""
        layer, ranks = self.layer, collectives.size
        fresh = tf.equal(layer.captured_at, now)
        at = step.read_value()
        u = kernels.scaled(layer.captured.read_value(), settings, at)
        xi, rows, weights = u, self.rows.read_value(), self.weights.read_value()
        if self.sketch is not None:
            full = settings.coupling == "full"
            label = f"{layer.name}/rows"
            seen = self._all_scores(u, settings, collectives, prefix) if full else u
            rows, weights = kernels.choose_rows(seen, self.sketch, settings, at, label)
            xi = tf.gather(u, rows, axis=1) * weights
        offset = tf.constant(0)
        divisor = 1
        if settings.coupling == "full" and ranks > 1:
            counts = collectives.allgather(tf.shape(u)[:1], f"{prefix}.rho/{layer.name}")
            offset = tf.reduce_sum(counts[:collectives.rank])
            xi = collectives.allgather(xi, f"{prefix}.xi/{layer.name}")
            divisor = ranks
        gram = tf.cast(tf.matmul(xi, xi, transpose_b=True), tf.float64) / divisor
        lower, good = kernels.factor(gram, lam)
        good = tf.logical_and(tf.logical_and(good, fresh), tf.reduce_all(tf.math.is_finite(u)))
        return Candidate(u, xi, rows, weights, gram, lower, lam, offset, good)

    def _all_scores(self, u: tf.Tensor, settings: Settings, collectives: Collectives,
                    prefix: str) -> tf.Tensor:
        """What leverage sampling looks at when all ranks must choose the same rows."""
        if settings.sketch != "leverage" or collectives.size == 1:
            return u
        scores = collectives.allreduce(tf.reduce_sum(u * u, axis=0),
                                       f"{prefix}.scores/{self.layer.name}")
        return tf.sqrt(scores)[None]

    def commit(self, new: Candidate, step: tf.Variable) -> tf.Tensor:
        """Put a candidate in place."""
        for name in ("u", "xi", "rows", "weights", "gram", "lower", "lam", "offset"):
            getattr(self, name).assign(getattr(new, name))
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
        """``(g - mean_i U_i b_i)/lam`` (SENG eq. 26), b of the former gradient when lagged (eq. 27)."""
        solved_for = g
        if settings.coupling == "lagged":
            solved_for = tf.cond(tf.size(self.previous) > 0, lambda: self.previous.read_value(),
                                 lambda: g)
            solved_for = tf.ensure_shape(solved_for, g.shape)
        seen = solved_for
        if self.sketch is not None:
            seen = tf.gather(solved_for, self.rows) * self.weights
        ranks = collectives.size if settings.coupling == "full" else 1
        b = kernels.coefficients(self.lower.read_value(), self.xi.read_value(), seen, ranks)
        u = self.u.read_value()
        own = b[self.offset:self.offset + tf.shape(u)[0]]
        message = tf.linalg.matvec(u, own, transpose_a=True) * float(np.sqrt(ranks))
        message = tf.ensure_shape(message, g.shape)
        mean = collectives.if_many(
            lambda: collectives.allreduce(message, f"{prefix}.uc/{self.layer.name}"),
            lambda: message)
        return (g - mean) / tf.cast(lam, g.dtype)

    def remember(self, g: tf.Tensor, good: tf.Tensor) -> None:
        """Keep this step's gradient for the next one (SENG eq. 27)."""
        self.previous.assign(tf.cond(good, lambda: g, lambda: self.previous.read_value()))

    def report(self, step: int) -> dict[str, Any]:
        """What there is to say of the layer."""
        held = [self.u, self.xi, self.lower] if self.sketch else [self.u, self.lower]
        sizes = [int(tf.size(tensor)) * tensor.dtype.size for tensor in held]
        return {"layer": self.layer.name, "kind": self.layer.registered.kind, "n": self.layer.n,
                "rho": int(tf.shape(self.u)[0]), "sketch": self.sketch, "bytes": sum(sizes),
                "age": step - int(self.taken_at), "failures": int(self.failures)}

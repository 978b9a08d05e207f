"""Implicit layers under SENG: too large for U, held as the factors G_i and A_i of their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from hvd_ext.seng import LayerPlan, Settings
from hvd_ext.tensorflow import seng_kernels as kernels
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.seng_capture import Layer
from hvd_ext.tensorflow.seng_state import Candidate, LayerState, bytes_of, held, row_scores


class ImplicitState(LayerState):
    """Factors cut to rank r, (rho, groups, n_G, r) and (rho, groups, n_A, r), and their sketches.

    A has a row of ones for the bias. ``groups, n_g, n_a`` are those of the kernel and that row.
    """

    def __init__(self, layer: Layer, plan: LayerPlan, groups: int, n_g: int, n_a: int) -> None:
        super().__init__(layer)
        self.plan = plan
        self.groups, self.n_g, self.n_a = groups, n_g, n_a
        zeta_g, zeta_a = plan.rows_g or n_g, plan.rows_a or n_a

        def factor(rows: int) -> tf.Variable:
            return held(tf.zeros((0, groups, rows, 0)), (None, groups, rows, None))

        self.g, self.a = factor(n_g), factor(n_a)
        self.xg, self.xa = factor(zeta_g), factor(zeta_a)
        self.rows_g = held(tf.range(zeta_g, dtype=tf.int64))
        self.rows_a = held(tf.range(zeta_a, dtype=tf.int64))
        self.weights_g, self.weights_a = held(tf.ones((zeta_g,))), held(tf.ones((zeta_a,)))

    def candidate(self, settings: Settings, step: tf.Variable, now: tf.Variable, lam: tf.Tensor,
                  collectives: Collectives, prefix: str) -> Candidate:
        layer, ranks = self.layer, collectives.size
        fresh = tf.equal(layer.captured_at, now)
        at = step.read_value()
        g, a = kernels.scaled(layer.captured_g.read_value(), settings, at,
                              layer.captured_a.read_value())
        kappa = layer.kappa
        if kappa is None:
            raise ValueError(f"{layer.name} took no part in the forward and backward pass; name it "
                             "in exclude=")
        g = tf.ensure_shape(g, (None, self.groups, self.n_g, kappa))
        a = tf.ensure_shape(a, (None, self.groups, self.n_a - len(layer.weights) + 1, kappa))
        if len(layer.weights) > 1:
            a = tf.concat([a, tf.ones_like(a[:, :, :1])], axis=2)
        finite = tf.logical_and(tf.reduce_all(tf.math.is_finite(g)),
                                tf.reduce_all(tf.math.is_finite(a)))
        # What is not finite must not reach the eigenvalue solver; it is refused for it below.
        g, a = (tf.where(finite, factor, tf.zeros_like(factor)) for factor in (g, a))
        g, a = kernels.truncate(g, a, int(self.plan.rank or kappa))
        new: Candidate = {"g": g, "a": a, "rho": tf.shape(g)[0], "offset": tf.constant(0)}
        new["xg"] = self._sketched(new, "g", g, self.plan.rows_g, settings, at, collectives, prefix)
        new["xa"] = self._sketched(new, "a", a, self.plan.rows_a, settings, at, collectives, prefix)
        divisor = 1
        if settings.coupling == "full" and ranks > 1:
            counts = collectives.allgather(tf.shape(g)[:1], f"{prefix}.rho/{layer.name}")
            new["offset"] = tf.reduce_sum(counts[:collectives.rank])
            for part in ("xg", "xa"):
                new[part] = collectives.allgather(new[part], f"{prefix}.{part}/{layer.name}")
            divisor = ranks
        gram = tf.cast(kernels.gram_implicit(new["xg"], new["xa"]), tf.float64) / divisor
        return {**new, **self.system(gram, lam, tf.logical_and(fresh, finite), [g, a])}

    def _sketched(self, new: Candidate, which: str, factor: tf.Tensor, q: int | None,
                  settings: Settings, at: tf.Tensor, collectives: Collectives,
                  prefix: str) -> tf.Tensor:
        if q is None:
            return factor
        label = f"{self.layer.name}/rows_{which}"
        scores = row_scores(tf.reduce_sum(factor * factor, axis=(0, 1, 3)), settings, collectives,
                            f"{prefix}.scores_{which}/{self.layer.name}")
        rows, weights = kernels.choose_rows(factor.shape[2], q, scores, settings, at, label)
        new[f"rows_{which}"], new[f"weights_{which}"] = rows, weights
        return tf.gather(factor, rows, axis=2) * weights[:, None]

    def subtracted(self, solved_for: tf.Tensor, settings: Settings, collectives: Collectives,
                   prefix: str) -> tf.Tensor:
        z = self._matrix(solved_for)
        if self.plan.rows_g is not None:
            z = tf.gather(z, self.rows_g, axis=1) * self.weights_g[:, None]
        if self.plan.rows_a is not None:
            z = tf.gather(z, self.rows_a, axis=2) * self.weights_a
        ranks = collectives.size if settings.coupling == "full" else 1
        rhs = kernels.project_implicit(self.xg.read_value(), self.xa.read_value(), z)
        b = kernels.coefficients(self.lower.read_value(), rhs / float(np.sqrt(ranks)))
        own = b[self.offset:self.offset + self.rho]
        g, a = self.g.read_value(), self.a.read_value()
        if settings.uc == "exact":
            parts = [kernels.expand_exact(g, a, own * float(np.sqrt(ranks)))]
        else:
            # Eq. 28's sum of sqrt|c_j| runs over all samples of the system.
            parts = list(kernels.factored_means(g, a, own * ranks,
                                                tf.reduce_sum(tf.sqrt(tf.abs(b)))))
        shapes = [tf.shape(part) for part in parts]
        message = tf.concat([tf.reshape(part, [-1]) for part in parts], axis=0)
        mean = collectives.if_many(
            lambda: collectives.allreduce(message, f"{prefix}.uc/{self.layer.name}"),
            lambda: message)
        first = tf.size(parts[0])
        matrix = tf.reshape(mean[:first], shapes[0])
        if settings.uc != "exact":
            matrix = tf.matmul(matrix, tf.reshape(mean[first:], shapes[1]), transpose_b=True)
        return self._flat(tf.ensure_shape(matrix, (self.groups, self.n_g, self.n_a)))

    def _matrix(self, flat: tf.Tensor) -> tf.Tensor:
        """A flat gradient, the kernel's and the bias's, as (groups, n_G, n_A)."""
        width = self.n_a - len(self.layer.weights) + 1
        size = width * self.groups * self.n_g
        kernel = tf.reshape(flat[:size], (width, self.groups, self.n_g))
        kernel = tf.transpose(kernel, (1, 2, 0))
        if len(self.layer.weights) == 1:
            return kernel
        return tf.concat([kernel, tf.reshape(flat[size:], (self.groups, self.n_g, 1))], axis=2)

    def _flat(self, matrix: tf.Tensor) -> tf.Tensor:
        width = self.n_a - len(self.layer.weights) + 1
        kernel = tf.reshape(tf.transpose(matrix[:, :, :width], (2, 0, 1)), [-1])
        return tf.concat([kernel, tf.reshape(matrix[:, :, width:], [-1])], axis=0)

    def description(self) -> dict[str, Any]:
        sketched = [self.xg] * bool(self.plan.rows_g) + [self.xa] * bool(self.plan.rows_a)
        sketch = f"{self.plan.rows_g or '-'} x {self.plan.rows_a or '-'}" if sketched else None
        return {"held": "implicit", "sketch": sketch, "rank": int(tf.shape(self.g)[3]),
                "bytes": bytes_of([self.g, self.a, self.lower, *sketched])}

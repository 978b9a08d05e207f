"""One layer's curvature in blocks over disjoint weights, which share one coefficient per sample.

:class:`Explicit` holds U, :class:`FactoredBlock` the factors of a kernel (and of a bias that is a row of
ones), ``EmbeddingBlock`` (``table.py``) the rows of an embedding that the samples use. Gradients are flat,
one per weight, in the layer's precision. What a block computes depends on the tensors it is given and on
its ``kind`` alone, so that blocks of one kind share traced functions; its variables only hold what was
computed.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from hvd_ext.seng import Settings
from hvd_ext.seng.plan import negligible_error
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.seng import kernels
from hvd_ext.tensorflow.seng.layer_discovery import Layer

Parts = dict[str, tf.Tensor]
"""Tensors of a block by the names of the variables that hold them."""


@dataclass(frozen=True)
class Context:
    """What a step works with: settings, the ranks, and the prefix of the collectives' names."""

    settings: Settings
    collectives: Collectives
    prefix: str

    @property
    def joined(self) -> bool:
        """Whether all ranks' samples make one system."""
        return self.settings.coupling == "full" and self.collectives.size > 1

    @property
    def root(self) -> float:
        """sqrt(M) of ``U = [U_1 ... U_M]/sqrt(M)`` in full coupling, else 1."""
        return float(self.collectives.size) ** 0.5 if self.joined else 1.0


def curvature_variable(value: Any, shape: Any = None) -> tf.Variable:
    """A variable of curvature; None in ``shape`` where an extent depends on the batch."""
    with tf.init_scope():
        value = tf.convert_to_tensor(value)
        variable = tf.Variable(value, trainable=False, shape=shape)
        variable.first = value  # to start anew; reading thousands of variables takes its time
        return variable


class Block(tf.Module, abc.ABC):
    """Curvature of the weights ``places`` of a layer."""

    def __init__(self, layer: Layer, places: Sequence[int], settings: Settings) -> None:
        super().__init__()
        self.layer = layer
        self.places = list(places)
        self.sizes = [layer.sizes[place] for place in places]
        self.dtype = layer.dtype
        self.stored = tf.as_dtype(settings.curvature_dtype or layer.dtype)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Everything that the block's computations depend on beside tensors and settings."""
        return (type(self).__name__, self.dtype, self.stored)

    @abc.abstractmethod
    def used_parts(self, context: Context) -> list[str]:
        """The names of what ``project`` and ``message`` read."""

    @abc.abstractmethod
    def build_curvature(self, u: tf.Tensor, g: tf.Tensor, a: tf.Tensor, lam: tf.Tensor, least: int
                        ) -> tuple[Parts, tf.Tensor]:
        """Of what a pass captured what is kept, and whether it is finite; zeros where it is not.

        ``lam`` is the damping, 0-D float64; ``least`` is what kappa is at least.
        """

    @abc.abstractmethod
    def sample_rows(self, parts: Parts, at: tf.Tensor, name: tf.Tensor, context: Context) -> None:
        """Choose rows and add Xi, of all ranks when they are joined; all ranks call it in the same order.

        Args:
            at: the step, 0-D int64. name: the layer's key, 0-D string; rows are drawn for it.
        """

    @abc.abstractmethod
    def gram_matrix(self, parts: Parts) -> tf.Tensor:
        """``Xi^T Xi`` of what ``sketch`` made."""

    @abc.abstractmethod
    def project_gradient(self, parts: Parts, gradients: Sequence[tf.Tensor], context: Context) -> tf.Tensor:
        """``Xi^T xi`` for the block's gradients (SENG eq. 12, 19)."""

    @abc.abstractmethod
    def local_contribution(self, parts: Parts, b: tf.Tensor, own: tf.Tensor, context: Context) -> tf.Tensor:
        """What this rank adds to ``U b``, flat, such that the mean over ranks is subtracted.

        ``b`` are the coefficients of the whole system, ``own`` those of this rank's samples.
        """

    @abc.abstractmethod
    def expand_contribution(self, mean: tf.Tensor, context: Context) -> list[tf.Tensor]:
        """``U b`` from the mean of the messages, flat, one per weight."""

    @abc.abstractmethod
    def count_samples(self, parts: Parts) -> tf.Tensor:
        """rho of what ``take`` gave, 0-D int32."""

    has_columns = False  # whether its factors have columns that must be as many on all ranks

    def columns_of(self, parts: Parts) -> tf.Tensor:
        """r of what ``take`` gave, 0-D int32; 0 without factors."""
        return tf.constant(0)

    def count_columns(self) -> int:
        """r of what is held; 0 without factors."""
        return 0

    def pad_columns(self, parts: Parts, r: tf.Tensor) -> None:
        """Bring factors to ``r`` columns per sample. Without factors there is nothing to do."""
        return

    @abc.abstractmethod
    def max_message_numel(self, context: Context) -> int:
        """The most numbers that a message can have."""

    def zero_message(self, context: Context) -> tf.Tensor:
        """A message of zeros."""
        return tf.zeros((sum(self.sizes),), self.dtype)

    def to_compute_dtype(self, value: tf.Tensor) -> tf.Tensor:
        """What is held in the precision it is computed in."""
        return tf.cast(value, self.dtype)

    def gather_sketch(self, xi: tf.Tensor, name: str, context: Context) -> tf.Tensor:
        """All ranks' Xi, (rho, ...) each; bfloat16 travels as float32, which holds it exactly."""
        wide = tf.float32 if xi.dtype == tf.bfloat16 else xi.dtype
        sent = tf.cast(xi, wide)
        together = context.collectives.allgather(sent, f"{context.prefix}.{name}/{self.layer.key}")
        return tf.cast(together, xi.dtype)


class Explicit(Block):
    """U (rho, n) and its sketch Xi (rho or all ranks', q), which is U itself without one."""

    def __init__(self, layer: Layer, places: Sequence[int], settings: Settings) -> None:
        super().__init__(layer, places, settings)
        self.q = layer.plan.sketch
        n = sum(self.sizes)
        self.u = curvature_variable(tf.zeros((0, n), self.stored), (None, None))
        if self.q is not None or settings.coupling == "full":
            self.xi = curvature_variable(tf.zeros((0, self.q or n), self.stored), (None, None))
        if self.q is not None:
            self.rows = curvature_variable(tf.zeros((self.q,), tf.int64), (None,))
            self.weights = curvature_variable(tf.zeros((self.q,), self.dtype), (None,))

    @property
    def kind(self) -> tuple[Any, ...]:
        return (*super().kind, self.q, self.q and sum(self.sizes))

    def _is_separate(self, context: Context) -> bool:
        return self.q is not None or context.joined

    def used_parts(self, context: Context) -> list[str]:
        sampled = ["rows", "weights"] if self.q is not None else []
        return ["u", *(["xi"] if self._is_separate(context) else []), *sampled]

    def build_curvature(self, u: tf.Tensor, g: tf.Tensor, a: tf.Tensor, lam: tf.Tensor, least: int
                        ) -> tuple[Parts, tf.Tensor]:
        finite = tf.reduce_all(tf.math.is_finite(u))
        return {"u": tf.cast(u, self.stored)}, finite

    def sample_rows(self, parts: Parts, at: tf.Tensor, name: tf.Tensor, context: Context) -> None:
        if not self._is_separate(context):
            return
        xi = parts["u"]
        if self.q is not None:
            wide = tf.cast(xi, self.dtype)
            scores = row_scores(tf.reduce_sum(wide * wide, axis=0), f"scores/{self.layer.key}", context)
            rows, weights = kernels.choose_rows(sum(self.sizes), self.q, scores, context.settings, at,
                                                tf.strings.join([name, "/rows"]))
            weights = tf.cast(weights, self.dtype)
            xi = tf.cast(tf.gather(wide, rows, axis=1) * weights, self.stored)
            parts.update(rows=rows, weights=weights)
        parts["xi"] = self.gather_sketch(xi, "xi", context) if context.joined else xi

    def gram_matrix(self, parts: Parts) -> tf.Tensor:
        xi = parts.get("xi", parts["u"])
        xi = tf.cast(xi, tf.float32) if xi.dtype == tf.bfloat16 else xi
        return tf.matmul(xi, xi, transpose_b=True)

    def project_gradient(self, parts: Parts, gradients: Sequence[tf.Tensor], context: Context) -> tf.Tensor:
        g = gradients[0] if len(gradients) == 1 else tf.concat(gradients, axis=0)
        if self.q is not None:
            g = tf.gather(g, parts["rows"]) * parts["weights"]
        return tf.linalg.matvec(self.to_compute_dtype(parts["xi" if self._is_separate(context) else "u"]), g)

    def local_contribution(self, parts: Parts, b: tf.Tensor, own: tf.Tensor, context: Context) -> tf.Tensor:
        return tf.linalg.matvec(self.to_compute_dtype(parts["u"]), own * context.root, transpose_a=True)

    def expand_contribution(self, mean: tf.Tensor, context: Context) -> list[tf.Tensor]:
        mean = tf.ensure_shape(mean, (sum(self.sizes),))
        return tf.split(mean, self.sizes) if len(self.sizes) > 1 else [mean]

    def count_samples(self, parts: Parts) -> tf.Tensor:
        return tf.shape(parts["u"])[0]

    def max_message_numel(self, context: Context) -> int:
        return sum(self.sizes)


class FactoredBlock(Block):
    """Factors cut to rank r, (groups, n_G, r, rho) and (groups, n_A, r, rho), and their sketches.

    Of the n_A rows the first ``width`` stand for the kernel, one more for a bias.
    """

    def __init__(self, layer: Layer, places: Sequence[int], settings: Settings) -> None:
        super().__init__(layer, places, settings)
        assert layer.groups is not None
        self.groups, self.n_g, self.width = layer.groups
        self.n_a = self.width + len(self.places) - 1
        self.q = {"g": layer.plan.rows_g, "a": layer.plan.rows_a}
        for part, rows in (("g", self.n_g), ("a", self.n_a)):
            q = self.q[part]
            setattr(self, part, self._factor_variable(rows))
            if q is not None or settings.coupling == "full":
                setattr(self, f"x{part}", self._factor_variable(q or rows))
            if q is not None:
                setattr(self, f"rows_{part}", curvature_variable(tf.zeros((q,), tf.int64), (None,)))
                setattr(self, f"weights_{part}", curvature_variable(tf.zeros((q,), self.dtype), (None,)))

    def _factor_variable(self, rows: int) -> tf.Variable:
        return curvature_variable(tf.zeros((self.groups, rows, 0, 0), self.stored),
                                  (self.groups, rows, None, None))

    @property
    def kind(self) -> tuple[Any, ...]:
        return (*super().kind, self.groups, self.n_g, self.n_a, self.width, self.q["g"], self.q["a"],
                self.layer.plan.rank, self.layer.plan.adaptive)

    def _is_separate(self, part: str, context: Context) -> bool:
        return self.q[part] is not None or context.joined

    def used_parts(self, context: Context) -> list[str]:
        return ["g", "a", *(f"x{part}" for part in "ga" if self._is_separate(part, context)),
                *(f"{name}_{part}" for part in "ga" if self.q[part] for name in ("rows", "weights"))]

    def build_curvature(self, u: tf.Tensor, g: tf.Tensor, a: tf.Tensor, lam: tf.Tensor, least: int
                        ) -> tuple[Parts, tf.Tensor]:
        if self.n_a > self.width:
            a = tf.concat([a, tf.ones_like(a[..., :1])], axis=-1)
        finite = tf.logical_and(tf.reduce_all(tf.math.is_finite(g)),
                                tf.reduce_all(tf.math.is_finite(a)))
        # What is not finite must not reach the eigenvalue solver; it is refused afterwards.
        g, a = tf.cond(finite, lambda: (g, a), lambda: (tf.zeros_like(g), tf.zeros_like(a)))
        g, a = (tf.ensure_shape(factor, (None, self.groups, None, rows))
                for factor, rows in ((g, self.n_g), (a, self.n_a)))
        plan = self.layer.plan
        g, a = kernels.truncate_rank(g, a, int(plan.rank or 0), least, always=plan.adaptive)
        if plan.adaptive:
            r = kernels.effective_rank(g, a, negligible_error(lam))
            g, a = g[:, :, :r], a[:, :, :r]
        g, a = (tf.ensure_shape(factor, (None, self.groups, None, rows))
                for factor, rows in ((g, self.n_g), (a, self.n_a)))
        return {name: tf.cast(kernels.samples_last(factor), self.stored)
                for name, factor in (("g", g), ("a", a))}, finite

    def sample_rows(self, parts: Parts, at: tf.Tensor, name: tf.Tensor, context: Context) -> None:
        for part, count in (("g", self.n_g), ("a", self.n_a)):
            factor, q = parts[part], self.q[part]
            if q is not None:
                wide = tf.cast(factor, self.dtype)
                scores = row_scores(tf.reduce_sum(wide * wide, axis=(0, 2, 3)),
                                    f"scores_{part}/{self.layer.key}", context)
                rows, weights = kernels.choose_rows(count, q, scores, context.settings, at,
                                                    tf.strings.join([name, f"/rows_{part}"]))
                weights = tf.cast(weights, self.dtype)
                factor = tf.gather(wide, rows, axis=1) * weights[:, None, None]
                factor = tf.cast(factor, self.stored)
                parts[f"rows_{part}"], parts[f"weights_{part}"] = rows, weights
            if context.joined:
                everyone = self.gather_sketch(kernels.samples_first(factor), f"x{part}", context)
                factor = kernels.samples_last(everyone)
            if self._is_separate(part, context):
                parts[f"x{part}"] = factor

    def gram_matrix(self, parts: Parts) -> tf.Tensor:
        xg, xa = (parts.get(f"x{part}", parts[part]) for part in ("g", "a"))
        if xg.dtype == tf.bfloat16:
            xg, xa = tf.cast(xg, tf.float32), tf.cast(xa, tf.float32)
        return kernels.gram_implicit(xg, xa)

    def project_gradient(self, parts: Parts, gradients: Sequence[tf.Tensor], context: Context) -> tf.Tensor:
        xg, xa = (tf.ensure_shape(
            self.to_compute_dtype(parts[f"x{part}" if self._is_separate(part, context) else part]),
            (self.groups, self.q[part] or rows, None, None))
            for part, rows in (("g", self.n_g), ("a", self.n_a)))
        kernel = tf.reshape(gradients[0], (self.width, self.groups * self.n_g))
        bias = tf.reshape(gradients[1], (1, -1)) if len(gradients) > 1 else None
        if self.q["a"] is None:
            total = kernels.project_implicit(xg, xa[:, :self.width], self._sampled_columns(kernel, parts))
            if bias is None:
                return total
            return total + kernels.project_implicit(xg, xa[:, self.width:],
                                                    self._sampled_columns(bias, parts))
        rows = tf.gather(kernel, tf.minimum(parts["rows_a"], self.width - 1))
        if bias is not None:
            rows = tf.where(tf.less(parts["rows_a"], self.width)[:, None], rows, bias)
        return kernels.project_implicit(xg, xa,
                                        self._sampled_columns(rows * parts["weights_a"][:, None], parts))

    def _sampled_columns(self, rows: tf.Tensor, parts: Parts) -> tf.Tensor:
        """Rows of the gradient's matrix with what Omega_G samples of their columns."""
        matrix = kernels.matrix_of(rows, self.groups, self.n_g)
        if self.q["g"] is None:
            return matrix
        return tf.gather(matrix, parts["rows_g"], axis=2) * parts["weights_g"]

    def local_contribution(self, parts: Parts, b: tf.Tensor, own: tf.Tensor, context: Context) -> tf.Tensor:
        g, a = (tf.ensure_shape(self.to_compute_dtype(parts[part]), (self.groups, rows, None, None))
                for part, rows in (("g", self.n_g), ("a", self.n_a)))
        if context.settings.uc == "exact":
            return kernels.flat_of(kernels.expand_exact(g, a, own * context.root))
        # Eq. 28's sum of sqrt|c_j| runs over all samples of the system.
        means = kernels.factored_means(g, a, own * context.root ** 2, tf.reduce_sum(tf.sqrt(tf.abs(b))))
        return tf.concat([tf.reshape(mean, [-1]) for mean in means], axis=0)

    def expand_contribution(self, mean: tf.Tensor, context: Context) -> list[tf.Tensor]:
        if context.settings.uc == "exact":
            return tf.split(mean, self.sizes) if len(self.sizes) > 1 else [mean]
        rows = self.groups * (self.n_g + self.n_a)
        r = tf.size(mean) // rows
        cut = self.groups * self.n_g * r
        g = tf.reshape(mean[:cut], tf.stack([self.groups, self.n_g, r]))
        a = tf.reshape(mean[cut:], tf.stack([self.groups, self.n_a, r]))
        parts = [a] if self.n_a == self.width else [a[:, :self.width], a[:, self.width:]]
        return [tf.ensure_shape(kernels.flat_of(tf.ensure_shape(
            tf.matmul(part, g, transpose_b=True), (self.groups, None, self.n_g))), (size,))
            for part, size in zip(parts, self.sizes, strict=True)]

    has_columns = True

    def count_samples(self, parts: Parts) -> tf.Tensor:
        return tf.shape(parts["g"])[3]

    def columns_of(self, parts: Parts) -> tf.Tensor:
        return tf.shape(parts["g"])[2]

    def count_columns(self) -> int:
        return int(tf.shape(self.g)[2])

    def pad_columns(self, parts: Parts, r: tf.Tensor) -> None:
        parts.update(g=kernels.pad_columns(parts["g"], r), a=kernels.pad_columns(parts["a"], r))

    def max_message_numel(self, context: Context) -> int:
        if context.settings.uc == "exact":
            return sum(self.sizes)
        return self.groups * (self.n_g + self.n_a) * int(self.layer.plan.rank or 1)

    def zero_message(self, context: Context) -> tf.Tensor:
        exact = context.settings.uc == "exact"
        r = tf.shape(self.g.read_value())[2]
        size = sum(self.sizes) if exact else self.groups * (self.n_g + self.n_a) * r
        return tf.zeros(tf.reshape(size, (1,)), self.dtype)


def row_scores(squares: tf.Tensor, name: str, context: Context) -> tf.Tensor | None:
    """What leverage sampling goes by; of all ranks together when they must choose the same rows."""
    if context.settings.sketch != "leverage":
        return None
    if not context.joined:
        return squares
    return context.collectives.allreduce(squares, f"{context.prefix}.{name}")

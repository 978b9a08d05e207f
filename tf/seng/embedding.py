"""The curvature of an embedding: the rows that each sample uses, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvd_ext.seng import Settings
from hvd_ext.tensorflow.seng import kernels
from hvd_ext.tensorflow.seng.blocks import Block, Context, Parts, curvature_variable
from hvd_ext.tensorflow.seng.layer_discovery import Layer


class EmbeddingBlock(Block):
    """Rows of an embedding and their gradients: ``rows`` (rho, kappa) and ``g`` (rho, kappa, n_G).

    Never (rho, V): of a table of V rows a sample has as many numbers as it uses rows. All rows that are
    used count, there is no sketch. With joined ranks ``xrows`` and ``xg`` are those of all.
    """

    has_columns = True

    def __init__(self, layer: Layer, places: Sequence[int], settings: Settings) -> None:
        super().__init__(layer, places, settings)
        assert layer.groups is not None
        self.n_g = layer.groups[1]
        for x in ("", "x") if settings.coupling == "full" else ("",):
            setattr(self, f"{x}rows", curvature_variable(tf.zeros((0, 0), tf.int64), (None, None)))
            setattr(self, f"{x}g",
                    curvature_variable(tf.zeros((0, 0, self.n_g), self.stored), (None, None, None)))

    @property
    def kind(self) -> tuple[Any, ...]:
        return (*super().kind, self.n_g, sum(self.sizes))

    def used_parts(self, context: Context) -> list[str]:
        return ["rows", "g", *(["xrows", "xg"] if context.joined else [])]

    def build_curvature(self, u: tf.Tensor, g: tf.Tensor, a: tf.Tensor, lam: tf.Tensor, least: int
                        ) -> tuple[Parts, tf.Tensor]:
        finite = tf.reduce_all(tf.math.is_finite(g))
        return {"rows": a[:, 0, :, 0], "g": tf.cast(g[:, 0], self.stored)}, finite

    def sample_rows(self, parts: Parts, at: tf.Tensor, name: tf.Tensor, context: Context) -> None:
        if context.joined:
            parts["xrows"] = self.gather_sketch(parts["rows"], "xrows", context)
            parts["xg"] = self.gather_sketch(parts["g"], "xg", context)

    def gram_matrix(self, parts: Parts) -> tf.Tensor:
        return kernels.gram_table(parts.get("xrows", parts["rows"]),
                                  self.to_compute_dtype(parts.get("xg", parts["g"])))

    def project_gradient(self, parts: Parts, gradients: Sequence[tf.Tensor], context: Context) -> tf.Tensor:
        x = "x" if context.joined else ""
        return kernels.project_table(parts[f"{x}rows"], self.to_compute_dtype(parts[f"{x}g"]),
                                     tf.reshape(gradients[0], (-1, self.n_g)))

    def local_contribution(self, parts: Parts, b: tf.Tensor, own: tf.Tensor, context: Context) -> tf.Tensor:
        return kernels.expand_table(parts["rows"], self.to_compute_dtype(parts["g"]), own * context.root,
                                    sum(self.sizes) // self.n_g)

    def expand_contribution(self, mean: tf.Tensor, context: Context) -> list[tf.Tensor]:
        return [tf.ensure_shape(mean, (sum(self.sizes),))]

    def count_samples(self, parts: Parts) -> tf.Tensor:
        return tf.shape(parts["rows"])[0]

    def columns_of(self, parts: Parts) -> tf.Tensor:
        return tf.shape(parts["rows"])[1]

    def count_columns(self) -> int:
        return int(tf.shape(self.rows)[1])

    def pad_columns(self, parts: Parts, r: tf.Tensor) -> None:
        missing = tf.maximum(r - self.columns_of(parts), 0)
        parts.update(rows=tf.pad(parts["rows"], [[0, 0], [0, missing]]),
                     g=tf.pad(parts["g"], [[0, 0], [0, missing], [0, 0]]))

    def max_message_numel(self, context: Context) -> int:
        return sum(self.sizes)

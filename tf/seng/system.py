"""One layer's curvature between steps: its blocks, the small system of SENG eq. 9, its last gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

from hvd_ext.seng import Held, Settings
from hvd_ext.tensorflow.seng import kernels
from hvd_ext.tensorflow.seng.blocks import Block, Context, Explicit, Parts, Product, held
from hvd_ext.tensorflow.seng.capture import Captured, put
from hvd_ext.tensorflow.seng.inventory import Layer


@dataclass
class Candidate:
    """Curvature that counts once all ranks have theirs: of the blocks, and of the system."""

    blocks: list[Parts]
    system: Parts
    good: tf.Tensor


class LayerSystem(tf.Module):
    """A layer's blocks and small system.

    ``gram`` and its factor ``lower`` (total, total) are float64, total the samples that the system
    joins, this rank's ``rho`` of them from ``offset`` on. ``ready``: there is curvature.
    """

    def __init__(self, layer: Layer, captured: Captured, settings: Settings) -> None:
        super().__init__()
        self.layer = layer
        self.captured = captured
        self.blocks: list[Block] = []
        places, product = range(len(layer.weights)), layer.together
        if product:
            self.blocks.append(Product(layer, places[:product], settings))
        if product < len(layer.weights):
            self.blocks.append(Explicit(layer, places[product:], settings))
        self.gram = held(tf.zeros((0, 0), tf.float64), (None, None))
        self.lower = held(tf.zeros((0, 0), tf.float64), (None, None))
        self.jitter = held(tf.constant(0.0, tf.float64))
        self.rho = held(tf.constant(0, tf.int32))
        self.offset = held(tf.constant(0, tf.int32))
        self.coefficients = held(tf.zeros((0,), layer.dtype), (None,))
        self.ready = held(False)
        self.taken_at = held(tf.constant(-1, tf.int64))
        self.failures = held(tf.constant(0, tf.int64))
        self.keeps = held(False)
        self.previous = [held(tf.zeros((0,), layer.dtype), (None,)) for _ in layer.weights]

    # Made at a refresh

    def take(self, number: tf.Variable) -> tuple[list[Parts], tf.Tensor]:
        """What pass ``number`` gave each block, and whether it is of that pass and finite."""
        good = tf.equal(self.captured.at, number)
        taken = []
        for block in self.blocks:
            parts, finite = block.take(self.captured)
            taken.append(parts)
            good = tf.logical_and(good, finite)
        return taken, good

    def candidate(self, taken: list[Parts], good: tf.Tensor, at: tf.Tensor, lam: tf.Tensor,
                  context: Context) -> Candidate:
        """Sketches and the small system; all ranks call it in the same order."""
        for block, parts in zip(self.blocks, taken, strict=True):
            block.sketch(parts, at, context)
        rho, offset = self.blocks[0].samples(taken[0]), tf.constant(0)
        if context.joined:
            counts = context.collectives.allgather(rho[None],
                                                   f"{context.prefix}.rho/{self.layer.key}")
            offset = tf.reduce_sum(counts[:context.collectives.rank])
        grams = [tf.cast(block.gram(parts), tf.float64)
                 for block, parts in zip(self.blocks, taken, strict=True)]
        gram = tf.add_n(grams) / context.root ** 2
        lower, jitter, factored = kernels.factor(gram, lam)
        system = {"gram": gram, "lower": lower, "jitter": jitter, "rho": rho, "offset": offset,
                  "taken_at": at, "ready": tf.constant(True)}
        return Candidate(taken, system, tf.logical_and(good, factored))

    def commit(self, new: Candidate) -> tf.Tensor:
        """Put a candidate in place."""
        for block, parts in zip(self.blocks, new.blocks, strict=True):
            block.put(parts)
        for name, value in new.system.items():
            put(getattr(self, name), value)
        return tf.constant(True)

    def fail(self) -> tf.Tensor:
        """Count a refresh without curvature; what was there stays."""
        self.failures.assign_add(1)
        return tf.constant(True)

    def factor(self, lam: tf.Tensor) -> None:
        """Factor the small system for another damping.

        Should it have no factor, the last one still gives a direction, the same on every rank.
        """
        lower, jitter, good = kernels.factor(self.gram.read_value(), lam)
        put(self.lower, tf.cond(good, lambda: lower, self.lower.read_value))
        self.jitter.assign(jitter)

    # Used at every step

    def message(self, gradients: Sequence[tf.Tensor], context: Context) -> list[tf.Tensor]:
        """What this rank adds to ``U b`` such that the mean over ranks is subtracted, by block.

        ``b`` is that of SENG eq. 9 or 12; explicit blocks and the exact form give ``U_i b_i``
        (eq. 25, 26), the factored form the two means of eq. 28.
        """
        rhs = [block.project([gradients[place] for place in block.places], context)
               for block in self.blocks]
        b = kernels.coefficients(self.lower.read_value(), tf.add_n(rhs) / context.root)
        put(self.coefficients, b)
        own = b[self.offset:self.offset + self.rho] if context.joined else b
        return [block.message(b, own, context) for block in self.blocks]

    def subtract(self, means: Sequence[tf.Tensor], gradients: Sequence[tf.Tensor],
                 factor: tf.Tensor, context: Context) -> list[tf.Tensor]:
        """``(g - U b) factor`` with the means of the messages (SENG eq. 8), flat, one per weight."""
        found: dict[int, tf.Tensor] = {}
        for block, mean in zip(self.blocks, means, strict=True):
            for place, ub in zip(block.places, block.expand(mean, context), strict=True):
                found[place] = (gradients[place] - ub) * factor
        return [found[place] for place in range(len(gradients))]

    # The gradient of the step before ("lagged" coupling)

    def keep(self, gradients: Sequence[tf.Tensor]) -> None:
        """Remember these gradients for the next step (SENG eq. 27)."""
        for kept, g in zip(self.previous, gradients, strict=True):
            put(kept, g)
        self.keeps.assign(True)

    def kept(self) -> list[tf.Tensor]:
        """The gradients of the step before, which there must be."""
        return [tf.ensure_shape(kept.read_value(), (size,))
                for kept, size in zip(self.previous, self.layer.sizes, strict=True)]

    def kept_or(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The gradients of the step before, or ``gradients`` where there are none."""
        return list(tf.cond(self.keeps, self.kept, lambda: [tf.identity(g) for g in gradients]))

    def held(self, step: int) -> Held | None:
        """What the report shows; None without curvature."""
        if not bool(self.ready):
            return None
        tensors = [self.gram, self.lower, *(v for block in self.blocks for v in block.variables)]
        return Held(rho=int(self.rho), r=self.blocks[0].columns(),
                    itemsize=self.blocks[0].stored.size,
                    nbytes=sum(int(tf.size(t)) * t.dtype.size for t in tensors),
                    jitter=float(self.jitter), age=step - int(self.taken_at),
                    coefficient_norm=float(tf.norm(self.coefficients)))

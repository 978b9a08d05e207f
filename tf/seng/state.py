"""What SENG keeps of one layer between steps: its blocks, the small system, and counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from hvd_ext.seng import Report, Settings, elements_held
from hvd_ext.tensorflow.seng import kernels
from hvd_ext.tensorflow.seng.blocks import Block, Explicit, Parts, Product, Run, held
from hvd_ext.tensorflow.seng.capture import Captured, put
from hvd_ext.tensorflow.seng.inventory import Layer


@dataclass
class Candidate:
    """Curvature that counts once all ranks have theirs: of the blocks, and of the system."""

    blocks: list[Parts]
    system: Parts
    good: tf.Tensor


class LayerState(tf.Module):
    """A layer's curvature. ``gram``, ``lower`` (total, total) are float64, total the samples that
    the system joins, this rank's ``rho`` of them from ``offset`` on."""

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
                  run: Run) -> Candidate:
        """Sketches and the small system; all ranks call it alike."""
        rho = offset = None
        for block, parts in zip(self.blocks, taken, strict=True):
            block.sketch(parts, at, run)
            rho = tf.shape(parts["u"])[0] if "u" in parts else tf.shape(parts["g"])[3]
        if run.joined:
            counts = run.collectives.allgather(rho[None], f"{run.prefix}.rho/{self.layer.key}")
            offset = tf.reduce_sum(counts[:run.collectives.rank])
        grams = [tf.cast(block.gram(parts), tf.float64)
                 for block, parts in zip(self.blocks, taken, strict=True)]
        gram = tf.add_n(grams) / run.root ** 2
        lower, jitter, factored = kernels.factor(gram, lam)
        system = {"gram": gram, "lower": lower, "jitter": jitter, "rho": rho,
                  "offset": tf.constant(0) if offset is None else offset, "taken_at": at,
                  "ready": tf.constant(True)}
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

    def factor_again(self, lam: tf.Tensor) -> None:
        """Factor the small system for another damping.

        Should it have no factor, the former one still gives a direction, the same on every rank.
        """
        lower, jitter, good = kernels.factor(self.gram.read_value(), lam)
        put(self.lower, tf.cond(good, lambda: lower, self.lower.read_value))
        self.jitter.assign(jitter)

    def message(self, gradients: Sequence[tf.Tensor], run: Run) -> list[tf.Tensor]:
        """What this rank adds to ``U b`` for the gradients (SENG eq. 9, 12, 26), by block."""
        rhs = [block.project([gradients[place] for place in block.places], run)
               for block in self.blocks]
        b = kernels.coefficients(self.lower.read_value(), tf.add_n(rhs) / run.root)
        put(self.coefficients, b)
        own = b[self.offset:self.offset + self.rho] if run.joined else b
        return [block.message(b, own, run) for block in self.blocks]

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

    def directions(self, gradients: Sequence[tf.Tensor], means: Sequence[tf.Tensor],
                   factor: tf.Tensor, run: Run) -> list[tf.Tensor]:
        """``(g - U b) factor`` with the means of the messages (SENG eq. 8), flat, one a weight."""
        found: dict[int, tf.Tensor] = {}
        for block, mean in zip(self.blocks, means, strict=True):
            for place, ub in zip(block.places, block.expand(mean, run), strict=True):
                found[place] = (gradients[place] - ub) * factor
        return [found[place] for place in range(len(gradients))]

    def row(self, step: int) -> dict[str, Any]:
        """What there is to say of the layer, see :data:`hvd_ext.seng.report.COLUMNS`."""
        shape, plan = self.layer.shape, self.layer.plan
        row: dict[str, Any] = {
            "layer": self.layer.name, "kind": shape.kind,
            "held": "implicit" if plan.implicit else "explicit", "n": shape.n, "n_G": shape.n_g,
            "n_A": shape.n_a, "groups": shape.groups, "sketch": _sketch_said(plan), "bytes": 0,
            "formula_bytes": 0, "failures": int(self.failures)}
        if not bool(self.ready):
            return {**row, "held": "identity"}
        first, rho = self.blocks[0], int(self.rho)
        r = int(tf.shape(first.g)[2]) if isinstance(first, Product) else 0
        tensors = [self.gram, self.lower, *(v for block in self.blocks for v in block.variables)]
        size = first.stored.size
        return {**row, "rho": rho, "rank": r or None, "jitter": float(self.jitter),
                "bytes": sum(int(tf.size(t)) * t.dtype.size for t in tensors),
                "formula_bytes": size * elements_held(shape, plan, rho=rho, r=r),
                "coefficient_norm": float(tf.norm(self.coefficients)),
                "age": step - int(self.taken_at)}


def _sketch_said(plan: Any) -> str | None:
    if plan.implicit:
        rows = [str(count or "all") for count in (plan.rows_g, plan.rows_a)]
        return " × ".join(rows) if plan.rows_g or plan.rows_a else None
    return None if plan.sketch is None else str(plan.sketch)


def report(states: Sequence[LayerState], settings: Settings, *, step: int, skipped: int, ranks: int,
           identity_parameters: int) -> Report:
    """All layers' rows and the totals."""
    rows = [state.row(step) for state in states]
    return Report(
        layers=rows, step=step, damping=settings.damping_at(step), coupling=settings.coupling,
        ranks=ranks, bytes=sum(row["bytes"] for row in rows),
        formula_bytes=sum(row["formula_bytes"] for row in rows),
        identity_parameters=identity_parameters, failures=sum(row["failures"] for row in rows),
        skipped=skipped)

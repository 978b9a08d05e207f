"""One layer's curvature between steps: its blocks, the small system of SENG eq. 9, its last gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from hvd_ext.seng import LayerStats, Settings
from hvd_ext.tensorflow.seng import kernels
from hvd_ext.tensorflow.seng.blocks import Block, Context, Explicit, FactoredBlock, Parts, curvature_variable
from hvd_ext.tensorflow.seng.capture import Captured, assign_any_shape
from hvd_ext.tensorflow.seng.embedding import EmbeddingBlock
from hvd_ext.tensorflow.seng.layer_discovery import Layer
from hvd_ext.tensorflow.seng.shared_functions import SharedFunctions, read_handle, write_handle

NAMES = ("gram", "lower", "jitter", "rho", "offset", "taken_at", "ready")
GOOD, FAILED, REFUSED = 2, 1, 0  # of a refresh; the ranks keep to the least


@dataclass
class Candidate:
    """Curvature that counts once all ranks have theirs, and whether this rank's is good."""

    blocks: list[Parts]
    system: Parts
    good: tf.Tensor


class LayerCurvature(tf.Module):
    """A layer's blocks and small system.

    ``gram`` and its factor ``lower`` (total, total) are float64, total the samples that the system
    joins, this rank's ``rho`` of them from ``offset`` on. ``ready``: there is curvature. ``wrong``: what was
    captured on this rank is not the layer's gradient; ``refused``: on some rank it is not, and the layer
    is left on the identity rule.
    """

    def __init__(self, layer: Layer, captured: Captured, settings: Settings, traces: SharedFunctions) -> None:
        super().__init__()
        self.layer = layer
        self.captured = captured
        self.traces = traces
        self.blocks: list[Block] = []
        places, product = range(len(layer.weights)), layer.together
        if product:
            kind = EmbeddingBlock if layer.registered.rows else FactoredBlock
            self.blocks.append(kind(layer, places[:product], settings))
        if product < len(layer.weights):
            self.blocks.append(Explicit(layer, places[product:], settings))
        self.gram = curvature_variable(tf.zeros((0, 0), tf.float64), (None, None))
        self.lower = curvature_variable(tf.zeros((0, 0), tf.float64), (None, None))
        self.jitter = curvature_variable(tf.constant(0.0, tf.float64))
        self.rho = curvature_variable(tf.constant(0, tf.int32))
        self.offset = curvature_variable(tf.constant(0, tf.int32))
        self.coefficients = curvature_variable(tf.zeros((0,), layer.dtype), (None,))
        self.ready = curvature_variable(False)
        self.taken_at = curvature_variable(tf.constant(-1, tf.int64))
        self.failures = curvature_variable(tf.constant(0, tf.int64))
        self.wrong = curvature_variable(False)
        self.refused = curvature_variable(False)
        if settings.coupling == "lagged":
            self.keeps = curvature_variable(False)
            self.previous = [curvature_variable(tf.zeros((0,), layer.dtype), (None,)) for _ in layer.weights]

    @property
    def lagged_variables(self) -> list[tf.Variable]:
        """The gradients of the step before, and whether there are any; only with "lagged" coupling."""
        return [self.keeps, *self.previous] if hasattr(self, "previous") else []

    @property
    def curvature_variables(self) -> list[tf.Variable]:
        """All that a refresh changes."""
        lagged = {id(one) for one in self.lagged_variables}
        return [one for one in self.variables if id(one) not in lagged]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the traced functions of this layer are shared by."""
        return tuple((block.kind, *block.places) for block in self.blocks)

    # Made at a refresh

    @property
    def has_columns(self) -> bool:
        """Whether it holds factors, whose columns must be as many on all ranks."""
        return any(block.has_columns for block in self.blocks)

    def build_curvature(self, number: tf.Variable, lam: tf.Tensor) -> tuple[list[Parts], tf.Tensor]:
        """What pass ``number`` gave each block, and whether it is of that pass and finite."""
        least = self.captured.least if self.has_columns else 0
        found, good = self.traces.call_shared(functools.partial(self._build_from_handles, least),
                                              ("take", self.kind, least),
                                              [lam, number, self.captured.at, *self.captured.held])
        return [dict(parts) for parts in found], good

    def _build_from_handles(self, least: int, lam: tf.Tensor, number: tf.Tensor, at: tf.Tensor,
                            *held: tf.Tensor) -> Any:
        """``take`` of what is behind handles."""
        good, found = tf.equal(read_handle(at, tf.int64, ()), read_handle(number, tf.int64, ())), []
        values = self.captured.read_handles(*held)
        for block in self.blocks:
            parts, finite = block.build_curvature(*values, lam, least)
            found.append(parts)
            good = tf.logical_and(good, finite)
        return found, good

    def take_candidate(self, number: tf.Variable, at: tf.Tensor, lam: tf.Tensor, context: Context
                       ) -> Candidate:
        """``take`` and ``candidate`` in one, where nothing is exchanged between them."""
        def made(at: tf.Tensor, lam: tf.Tensor, key: tf.Tensor, *handles: tf.Tensor) -> Any:
            taken, good = self._build_from_handles(0, lam, *handles)
            return self._make_candidate(taken, good, at, lam, key, context)

        blocks, system, good = self.traces.call_shared(
            made, ("take and candidate", self.kind),
            [at, lam, tf.constant(self.layer.key), number, self.captured.at, *self.captured.held])
        return Candidate([dict(parts) for parts in blocks], dict(system), good)

    def make_candidate(self, taken: list[Parts], good: tf.Tensor, at: tf.Tensor, lam: tf.Tensor,
                       context: Context) -> Candidate:
        """Sketches and the small system; all ranks call it in the same order."""
        names = [sorted(parts) for parts in taken]
        flat = [parts[name] for parts, own in zip(taken, names, strict=True) for name in own]
        key = tf.constant(self.layer.key)
        if context.joined:  # with collectives of its own
            return Candidate(*self._make_candidate(taken, good, at, lam, key, context))

        def made(good: tf.Tensor, at: tf.Tensor, lam: tf.Tensor, key: tf.Tensor, *flat: tf.Tensor) -> Any:
            given = iter(flat)
            parts = [{name: next(given) for name in own} for own in names]
            return self._make_candidate(parts, good, at, lam, key, context)

        blocks, system, good = self.traces.call_shared(made, ("candidate", self.kind),
                                                       [good, at, lam, key, *flat])
        return Candidate([dict(parts) for parts in blocks], dict(system), good)

    def _make_candidate(self, taken: list[Parts], good: tf.Tensor, at: tf.Tensor, lam: tf.Tensor,
                        key: tf.Tensor, context: Context) -> tuple[list[Parts], Parts, tf.Tensor]:
        for block, parts in zip(self.blocks, taken, strict=True):
            block.sample_rows(parts, at, key, context)
        rho, offset = self.blocks[0].count_samples(taken[0]), tf.constant(0)
        if context.joined:
            counts = context.collectives.allgather(rho[None],
                                                   f"{context.prefix}.rho/{self.layer.key}")
            offset = tf.reduce_sum(counts[:context.collectives.rank])
        grams = [tf.cast(block.gram_matrix(parts), tf.float64)
                 for block, parts in zip(self.blocks, taken, strict=True)]
        gram = tf.add_n(grams) / context.root ** 2
        lower, jitter, factored = kernels.factor_gram(gram, lam)
        system = {"gram": gram, "lower": lower, "jitter": jitter, "rho": rho, "offset": offset,
                  "taken_at": at, "ready": tf.constant(True)}
        return taken, system, tf.logical_and(good, factored)

    def install_candidate(self, new: Candidate, agreed: tf.Tensor) -> None:
        """Put a candidate in place, or count a refresh without curvature; what was there stays then."""
        names = [sorted(parts) for parts in new.blocks]
        values = [parts[name] for parts, own in zip(new.blocks, names, strict=True) for name in own]
        values += [new.system[name] for name in NAMES]
        handles = [getattr(block, name) for block, own in zip(self.blocks, names, strict=True)
                   for name in own] + [getattr(self, name) for name in NAMES]
        captured = self.captured.held
        kinds = [one.dtype for one in captured]
        ranks = [one.shape.rank for one in captured]

        def settled(agreed: tf.Tensor, failures: tf.Tensor, refused: tf.Tensor, *rest: tf.Tensor
                    ) -> tf.Tensor:
            new, to, clear = rest[:len(values)], rest[len(values):-3], rest[-3:]

            def commit() -> tf.Tensor:
                for handle, value in zip(to, new, strict=True):
                    write_handle(handle, value)
                return tf.constant(True)

            def fail() -> tf.Tensor:
                write_handle(failures, read_handle(failures, tf.int64) + 1)
                out = tf.equal(agreed, REFUSED)
                write_handle(refused, out)
                write_handle(to[-1],
                             tf.logical_and(read_handle(to[-1], tf.bool), tf.logical_not(out)))  # ready
                return tf.constant(True)

            tf.cond(tf.equal(agreed, GOOD), commit, fail)
            for handle, kind, rank in zip(clear, kinds, ranks, strict=True):
                # Free what was captured.
                empty = read_handle(handle, kind, [None] * rank)
                write_handle(handle, empty[:0] if rank == 2 else empty[:0, :, :0])
            return tf.constant(True)

        self.traces.call_shared(settled, ("settle", self.kind),
                                [agreed, self.failures, self.refused, *values, *handles, *captured])

    def refactor(self, lam: tf.Tensor) -> None:
        """Factor the small system for another damping.

        Should it have no factor, the last one still gives a direction, the same on every rank.
        """
        def factored(lam: tf.Tensor, gram: tf.Tensor, lower: tf.Tensor, jitter: tf.Tensor) -> tf.Tensor:
            new, added, good = kernels.factor_gram(read_handle(gram, tf.float64, (None, None)), lam)
            was = read_handle(lower, tf.float64, (None, None))
            write_handle(lower, tf.cond(good, lambda: new, lambda: was))
            write_handle(jitter, added)
            return tf.constant(True)

        self.traces.call_shared(factored, "factor", [lam, self.gram, self.lower, self.jitter])

    def resample_rows(self, at: tf.Tensor, lam: tf.Tensor, context: Context) -> None:
        """Other sampled rows for the curvature there is (SENG Algorithm 1).

        Without curvature, or should the new small system have no factor, everything stays. Joined ranks
        exchange their sketches; all call it in the same order.
        """
        if context.joined:
            self._resample_together(at, lam, context)
            return
        names = [block.used_parts(context) for block in self.blocks]
        variables = [[getattr(block, name) for name in own]
                     for block, own in zip(self.blocks, names, strict=True)]
        kinds = [[(one.dtype, one.shape) for one in own] for own in variables]

        def redrawn(at: tf.Tensor, lam: tf.Tensor, key: tf.Tensor, ready: tf.Tensor, gram: tf.Tensor,
                    lower: tf.Tensor, jitter: tf.Tensor, *handles: tf.Tensor) -> tf.Tensor:
            def draw() -> tf.Tensor:
                given = iter(handles)
                parts = [{name: read_handle(next(given), *kind) for name, kind in zip(own, mine, strict=True)}
                         for own, mine in zip(names, kinds, strict=True)]
                before = [dict(own) for own in parts]
                for block, own in zip(self.blocks, parts, strict=True):
                    block.sample_rows(own, at, key, context)
                made = tf.add_n([tf.cast(block.gram_matrix(own), tf.float64)
                                 for block, own in zip(self.blocks, parts, strict=True)])
                factor, added, good = kernels.factor_gram(made, lam)
                new = [(own[name], own[name] is not was[name])
                       for own, was, wanted in zip(parts, before, names, strict=True) for name in wanted]

                def commit() -> tf.Tensor:
                    for handle, (value, changed) in zip(handles, new, strict=True):
                        if changed:
                            write_handle(handle, value)
                    for handle, value in ((gram, made), (lower, factor), (jitter, added)):
                        write_handle(handle, value)
                    return tf.constant(True)

                return tf.cond(good, commit, lambda: tf.constant(False))

            return tf.cond(read_handle(ready, tf.bool), draw, lambda: tf.constant(False))

        self.traces.call_shared(redrawn, ("redraw", self.kind), [
            at, lam, tf.constant(self.layer.key), self.ready, self.gram, self.lower, self.jitter,
            *(one for own in variables for one in own)])

    def _resample_together(self, at: tf.Tensor, lam: tf.Tensor, context: Context) -> None:
        """``redraw`` of the system of all ranks: they all have curvature of the layer, or none of them."""
        names = [block.used_parts(context) for block in self.blocks]
        variables = [getattr(block, name) for block, own in zip(self.blocks, names, strict=True)
                     for name in own]
        given = iter(variables)
        parts = [{name: self.traces.variable_value(next(given)) for name in own} for own in names]
        before = [dict(own) for own in parts]
        # Also without curvature, of empty tensors: within a branch of a branch no rank may wait for another.
        for block, own in zip(self.blocks, parts, strict=True):
            block.sample_rows(own, at, tf.constant(self.layer.key), context)
        gram = tf.add_n([tf.cast(block.gram_matrix(own), tf.float64)
                         for block, own in zip(self.blocks, parts, strict=True)]) / context.root ** 2
        lower, jitter, good = kernels.factor_gram(gram, lam)
        new = [(self.traces.variable_handle(one), value) for one, value, was in zip(
            variables, (own[name] for own, mine in zip(parts, names, strict=True) for name in mine),
            (own[name] for own, mine in zip(before, names, strict=True) for name in mine), strict=True)
            if value is not was]
        new += [(self.traces.variable_handle(one), value)
                for one, value in ((self.gram, gram), (self.lower, lower), (self.jitter, jitter))]

        def commit() -> tf.Tensor:
            for handle, value in new:
                write_handle(handle, value)
            return tf.constant(True)

        tf.cond(tf.logical_and(self.traces.variable_value(self.ready), good), commit,
                lambda: tf.constant(False))

    # Used at every step

    def local_contribution(self, gradients: Sequence[tf.Tensor], context: Context) -> list[tf.Tensor]:
        """What this rank adds to ``U b`` such that the mean over ranks is subtracted, by block.

        ``b`` are the coefficients of the whole system, ``own`` those of this rank's samples;
        explicit blocks and the exact form give ``U_i b_i`` (eq. 25, 26), the factored form the two
        means of eq. 28.
        """
        wanted = [block.used_parts(context) for block in self.blocks]
        kinds = [[getattr(block, name).dtype for name in own]
                 for block, own in zip(self.blocks, wanted, strict=True)]

        def messages(coefficients: tf.Tensor, lower: tf.Tensor, rho: tf.Tensor, offset: tf.Tensor,
                     *rest: tf.Tensor) -> list[tf.Tensor]:
            gradients, given = rest[:len(self.layer.weights)], iter(rest[len(self.layer.weights):])
            parts = [{name: read_handle(next(given), dtype, getattr(block, name).shape)
                      for name, dtype in zip(own, dtypes, strict=True)}
                     for block, own, dtypes in zip(self.blocks, wanted, kinds, strict=True)]
            rhs = [block.project_gradient(held, [gradients[place] for place in block.places], context)
                   for block, held in zip(self.blocks, parts, strict=True)]
            b = kernels.solve_system(read_handle(lower, tf.float64, (None, None)),
                                     tf.add_n(rhs) / context.root)
            write_handle(coefficients, b)
            own = b
            if context.joined:
                first = read_handle(offset, tf.int32, ())
                own = b[first:first + read_handle(rho, tf.int32, ())]
            return [block.local_contribution(held, b, own, context)
                    for block, held in zip(self.blocks, parts, strict=True)]

        handles = [getattr(block, name) for block, own in zip(self.blocks, wanted, strict=True)
                   for name in own]
        key = ("message", self.kind, len(self.layer.weights), context.joined, context.root)
        return list(self.traces.call_shared(
            messages, key, [self.coefficients, self.lower, self.rho, self.offset, *gradients, *handles],
            shapes=[None] * 4 + [[None]] * len(gradients) + [None] * len(handles), inline=True))

    def apply_direction(self, means: Sequence[tf.Tensor], gradients: Sequence[tf.Tensor],
                        factor: tf.Tensor, context: Context) -> list[tf.Tensor]:
        """``(g - U b) factor`` with the means of the messages (SENG eq. 8), flat, one per weight."""
        found: dict[int, tf.Tensor] = {}
        for block, mean in zip(self.blocks, means, strict=True):
            for place, ub in zip(block.places, block.expand_contribution(mean, context), strict=True):
                found[place] = (gradients[place] - ub) * factor
        return [found[place] for place in range(len(gradients))]

    # The gradient of the step before ("lagged" coupling)

    def keep_gradients(self, gradients: Sequence[tf.Tensor]) -> None:
        """Remember these gradients for the next step (SENG eq. 27)."""
        for kept, g in zip(self.previous, gradients, strict=True):
            assign_any_shape(kept, g)
        self.keeps.assign(True)

    def kept_gradients(self) -> list[tf.Tensor]:
        """The gradients of the step before, which there must be."""
        return [tf.ensure_shape(kept.read_value(), (size,))
                for kept, size in zip(self.previous, self.layer.sizes, strict=True)]

    def kept_or(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The gradients of the step before, or ``gradients`` where there are none."""
        return list(tf.cond(self.keeps, self.kept_gradients, lambda: [tf.identity(g) for g in gradients]))

    def layer_stats(self, step: int) -> LayerStats | None:
        """What the report shows; None without curvature."""
        if not bool(self.ready):
            return None
        tensors = [self.gram, self.lower, *(v for block in self.blocks for v in block.variables)]
        return LayerStats(rho=int(self.rho), r=self.blocks[0].count_columns(),
                          itemsize=self.blocks[0].stored.size,
                          nbytes=sum(int(tf.size(t)) * t.dtype.size for t in tensors),
                          jitter=float(self.jitter), age=step - int(self.taken_at),
                          coefficient_norm=float(tf.norm(self.coefficients)))

"""A refresh of the curvature: sketch, small systems, and what ranks must agree on."""

from __future__ import annotations

from collections.abc import Sequence

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf

from hvd_ext.consistency.fingerprint import mismatched_ranks
from hvd_ext.seng import Settings, check_same_layers, layers_fingerprint, states_differ, strict_refusal
from hvd_ext.seng.once_warnings import OnceWarnings
from hvd_ext.seng.sample_axes import CONSTANT
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.seng.blocks import Context
from hvd_ext.tensorflow.seng.check import reason_of
from hvd_ext.tensorflow.seng.layer_curvature import FAILED, GOOD, REFUSED, LayerCurvature


def check_ranks(systems: Sequence[LayerCurvature], settings: Settings, collectives: Collectives, *,
                prefix: str, stamp: tuple[int, int], step: int, due: bool, by_rows: Sequence[str]
                ) -> list[str]:
    """See, outside of any graph, that the ranks have the same layers and states that belong together.

    Args:
        stamp: the (rank, ranks) that this rank's state is of, (-1, -1) for a new one.
        by_rows: names of layers of which this rank cannot tell the samples apart.

    Returns:
        Those of which some rank cannot.

    Raises:
        RuntimeError: on every rank, when layers, settings, dampings or steps differ.
        ValueError: on every rank, when one of them has restored another rank's state; when ``strict`` and
            some rank has layers in ``by_rows``.
    """
    here = (collectives.rank, collectives.size)
    mine = layers_fingerprint(settings, [
        (one.layer.key, one.layer.shape, one.layer.plan) for one in systems])
    foreign = None if stamp in (here, (-1, -1)) else stamp
    everyone = collectives.allgather_object((mine.number, foreign, (step, due), list(by_rows)),
                                            f"{prefix}.state")
    if mismatched_ranks([number for number, *_ in everyone]):
        check_same_layers(collectives.allgather_object(mine.lines, f"{prefix}.disagreement"))
    for rank, (_, other, *_) in enumerate(everyone):
        if other is not None:
            raise ValueError(
                f"the state restored into SENG on rank {rank} of {len(everyone)} is that of "
                f"rank {other[0]} of {other[1]}: save and restore one file per rank, or "
                "call reset_state() on all of them to take the curvature anew")
    if mismatched_ranks([at for _, _, at, _ in everyone]):
        raise states_differ([at[0] for _, _, at, _ in everyone])
    rows = list(dict.fromkeys(name for *_, names in everyone for name in names))
    if settings.strict and rows:
        raise ValueError(strict_refusal(rows))
    return rows


def refresh_curvature(systems: Sequence[LayerCurvature], number: tf.Variable, at: tf.Tensor, lam: tf.Tensor,
                      context: Context, notices: OnceWarnings) -> tf.Tensor:
    """New curvature of the layers that have one on every rank; others keep what they had.

    Args:
        number: of the pass that was captured.
        at: the step, 0-D int64. lam: the damping, 0-D float64.

    Returns:
        Whether there is one of any layer, 0-D bool.
    """
    if not systems:
        return tf.constant(True)  # no layer has a rule
    with systems[0].traces.unpacked_handles():
        return _refresh_systems(systems, number, at, lam, context, notices)


def resample_rows(systems: Sequence[LayerCurvature], at: tf.Tensor, lam: tf.Tensor,
                  context: Context) -> tf.Tensor:
    """Other sampled rows for the curvature that there is (SENG Algorithm 1)."""
    sampled = [system for system in systems if system.layer.plan.sampled]
    if sampled:
        with sampled[0].traces.unpacked_handles():
            for system in sampled:
                system.resample_rows(at, lam, context)
    return tf.constant(False)


def _refresh_systems(systems: Sequence[LayerCurvature], number: tf.Variable, at: tf.Tensor, lam: tf.Tensor,
                     context: Context, notices: OnceWarnings) -> tf.Tensor:
    apart = [system for system in systems if context.joined or system.has_columns]
    taken = {system: system.build_curvature(number, lam) for system in apart}
    _equal_columns(apart, [blocks for blocks, _ in taken.values()], context)
    made = [system.make_candidate(*taken[system], at, lam, context) if system in taken
            else system.take_candidate(number, at, lam, context) for system in systems]
    wrong = tf.stack([True if system.layer.samples == CONSTANT else system.traces.variable_value(system.wrong)
                      for system in systems])
    went = tf.where(wrong, REFUSED, tf.where(tf.stack([one.good for one in made]), GOOD, FAILED))
    collectives = context.collectives
    agreed = collectives.if_distributed(
        lambda: collectives.allreduce(went, f"{context.prefix}.refresh", op=horovod.Min),
        lambda: went)
    _say_refused(systems, agreed, notices)
    for k, (system, candidate) in enumerate(zip(systems, made, strict=True)):
        system.install_candidate(candidate, agreed[k])
    return tf.reduce_any(tf.equal(agreed, GOOD))


def _say_refused(systems: Sequence[LayerCurvature], agreed: tf.Tensor, notices: OnceWarnings) -> None:
    """One warning for the layers that a refresh leaves without curvature."""
    before = tf.stack([system.traces.variable_value(system.refused) for system in systems])
    reasons = {system.layer: reason_of(system.layer) for system in systems}

    def say(refused: np.ndarray) -> np.bool_:
        notices.warn_refused({layer.name: reason for (layer, reason), out
                              in zip(reasons.items(), refused, strict=True) if out})
        return np.bool_(True)

    tf.numpy_function(say, [tf.logical_and(tf.equal(agreed, REFUSED), tf.logical_not(before))], tf.bool)


def _equal_columns(systems: Sequence[LayerCurvature], taken: Sequence[list[dict[str, tf.Tensor]]],
                   context: Context) -> None:
    """Give factors as many columns as any rank's have, by zeros."""
    factors = [(block, parts) for system, blocks in zip(systems, taken, strict=True)
               for block, parts in zip(system.blocks, blocks, strict=True) if block.has_columns]
    if not factors or context.collectives.size == 1:
        return
    counts = tf.stack([block.columns_of(parts) for block, parts in factors])
    most = context.collectives.allreduce(counts, f"{context.prefix}.columns", op=horovod.Max)
    for k, (block, parts) in enumerate(factors):
        block.pad_columns(parts, most[k])

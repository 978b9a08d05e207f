"""A dataset for ``model.fit`` that has as many batches on every rank."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.uneven_inputs import GradientWeighting
from hvd_ext.watchdog.watchdog import WATCH

ENDLESS = -1


def pad_dataset(dataset: Any, collectives: Collectives, weighing: GradientWeighting) -> tuple[Any, bool]:
    """``dataset`` with its first batch again, at weight 0, until the longest of the ranks' ends.

    The second result is whether any rank sees a batch again. One exchange of the numbers of batches, here;
    none later.

    Raises:
        TypeError: it is no ``tf.data.Dataset`` of (inputs, targets) or (inputs, targets, sample weights).
        ValueError: on every rank, when a rank's has no end, none has a batch, or ``average_over=`` differs.
        RuntimeError: on the others, when a rank's cannot be read.
    """
    trouble = _no_targets(dataset)
    if trouble is not None:
        _gather_sizes(collectives, f"TypeError: {trouble}", weighing)
        raise TypeError(trouble)
    try:
        mine = _batch_sizes(dataset, count=weighing.by == "samples")
    except Exception as error:  # the user's data: anything can come, and the others must hear of it
        _gather_sizes(collectives, f"{type(error).__name__}: {error}", weighing)
        raise
    by_rank = _gather_sizes(collectives, mine, weighing)
    steps = max(map(len, by_rank))
    if steps == 0:
        raise ValueError("no rank's dataset has a batch")
    now = [[sizes[step] for sizes in by_rank if step < len(sizes)] for step in range(steps)]
    weights = [weighing.local_factor(mine[step], sum(now[step])) * weighing.global_factor(len(now[step]))
               if step < len(mine) else 0.0 for step in range(steps)]
    again = dataset.take(1) if mine else tf.data.Dataset.from_tensors(empty_batch(dataset))
    whole = dataset.concatenate(again.repeat()) if mine else again.repeat()
    both = tf.data.Dataset.zip((whole.take(steps), tf.data.Dataset.from_tensor_slices(weights)))
    return (both.map(_weigh_batch).apply(tf.data.experimental.assert_cardinality(steps)),
            any(len(sizes) < steps for sizes in by_rank))


def _no_targets(dataset: Any) -> str | None:
    if not isinstance(dataset, tf.data.Dataset):
        return f"padded() takes a tf.data.Dataset, got {type(dataset).__name__}; use batches() in a loop"
    spec = dataset.element_spec
    if not isinstance(spec, tuple) or len(spec) not in (2, 3):
        return ("padded() gives some batches the sample weight 0, which model.fit takes only with targets: "
                f"the dataset must have (inputs, targets) or (inputs, targets, weights), got {spec}")
    return None


def _gather_sizes(collectives: Collectives, mine: list[int] | str,
                  weighing: GradientWeighting) -> list[list[int]]:
    """Every rank's sizes of batches."""
    WATCH.start_watching(horovod.rank(), horovod.shutdown, horovod.is_initialized)
    WATCH.start_wait("the sizes of the ranks' datasets (padded)")
    try:
        found = collectives.allgather_object((mine, weighing.by), "hvd_ext/padded")
    finally:
        WATCH.end_wait()
    failed = [rank for rank, (one, _) in enumerate(found) if isinstance(one, str)]
    if failed and isinstance(mine, list):
        raise RuntimeError(f"the dataset of rank {failed[0]} cannot be padded: {found[failed[0]][0]}")
    ways = [by for _, by in found]
    if len(set(ways)) > 1:
        raise ValueError(f"the ranks' average_over= of hvd.uneven_inputs differ: {ways} by rank; give all of "
                         "them the same")
    endless = [rank for rank, (one, _) in enumerate(found) if one == [ENDLESS]]
    if endless:
        raise ValueError(f"the dataset of rank {endless[0]} has no end, so that no rank's is to be padded: "
                         "give model.fit steps_per_epoch=, or leave out repeat()")
    return [one for one, _ in found if isinstance(one, list)]


def _batch_sizes(dataset: Any, *, count: bool) -> list[int]:
    """The samples of each batch; 1 for each where only their number counts and is known."""
    known = int(dataset.cardinality())
    if known == tf.data.INFINITE_CARDINALITY:
        return [ENDLESS]
    if known >= 0 and not count:
        return [1] * known
    return [int(size) for size in dataset.map(lambda *batch: _count_rows(batch))]


def _count_rows(batch: Any) -> tf.Tensor:
    return tf.shape(tf.nest.flatten(batch)[0])[0]


def _weigh_batch(batch: Any, weight: tf.Tensor) -> tuple[Any, Any, Any]:
    x, y, *given = batch
    if not given:
        return x, y, tf.fill((_count_rows(batch),), weight)
    return x, y, tf.nest.map_structure(lambda one: tf.cast(one, weight.dtype) * weight, given[0])


def empty_batch(dataset: Any) -> Any:
    """A batch of one row of zeros, of the kind that a dataset without batches would give."""
    return tf.nest.map_structure(
        lambda spec: tf.zeros([1 if size is None else size for size in spec.shape], spec.dtype),
        dataset.element_spec)

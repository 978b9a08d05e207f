"""Uneven data: ranks that run out of batches at different times, and end together.

A rank that has run out shadows the others: it goes through the same step with a batch that it has had,
and its gradients count as zeros. So it takes part in every collective of that step, whatever they are.
One small sum before each step says who has a batch.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import horovod.tensorflow as horovod
import keras
import tensorflow as tf

from hvd_ext.horovod_api import join_barrier
from hvd_ext.horovod_api.signatures import refuse_old_names
from hvd_ext.reducers.delay_compensation import DelayCompensated
from hvd_ext.reducers.options import DenseReduction
from hvd_ext.reducers.powersgd import PowerSGD
from hvd_ext.reducers.registry import public_name, public_op
from hvd_ext.reducers.topk import TopK
from hvd_ext.tensorflow import keras_hooks
from hvd_ext.tensorflow.byte_counts import ScratchVariable
from hvd_ext.tensorflow.joining_layers import find_joining, find_trained_layers
from hvd_ext.tensorflow.padded_dataset import empty_batch, pad_dataset
from hvd_ext.uneven_inputs import OVERLAP_UNSUPPORTED_MSG, WEIGHTS, GradientWeighting, check_weighting
from hvd_ext.watchdog.watchdog import WATCH

JOIN_BLOCKERS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()  # what join cannot serve
PADDED_STATISTICS = (
    "padded() with {layers}: the batch that a rank sees again, with the sample weight 0, would enter the "
    "statistics of all ranks; train in a loop over hvd.uneven_inputs(optimizer).batches(dataset), where it "
    "does not")


def in_use(kept: Any) -> list[Any]:
    """What a weak container holds, without what is only not collected yet."""
    if len(kept) > 0:
        gc.collect()
    return list(kept)


@functools.cache
def batch_weight() -> ScratchVariable:
    """What a loss of this rank's batch weighs in the step that is under way: 1 outside of
    ``hvd.uneven_inputs``.

    0 on a rank that shadows the others: layers that join the ranks' batches leave its batch out.
    """
    cell = ScratchVariable(1, tf.float64)
    cell.assign(tf.ones((1,), tf.float64))
    return cell


class Scaling:
    """What gradients are multiplied with before and after their reduction, changeable between steps."""

    def __init__(self) -> None:
        self._factors = ScratchVariable(2, tf.float64)
        self._used = ScratchVariable(1)
        self._factors.assign(tf.ones((2,), tf.float64))
        self.refused: str | None = None  # why no step may be traced now
        self.padded: weakref.WeakSet[Any] = weakref.WeakSet()  # datasets where a rank sees a batch again
        self.joining: weakref.WeakSet[Any] = weakref.WeakSet()  # layers in its steps that would count it

    def set_factors(self, before: float, after: float) -> None:
        """Choose the factors of the next step."""
        self._factors.assign(tf.constant([before, after], tf.float64))
        batch_weight().assign(tf.constant([before], tf.float64))

    def check_padded(self) -> None:
        """Refuse layers that would count a batch that a rank sees again.

        Raises:
            ValueError: it names one.
        """
        joining = sorted(layer.name for layer in self.joining if layer.trainable)
        if joining and in_use(self.padded):
            raise ValueError(PADDED_STATISTICS.format(layers=f"SyncBatchNormalization ({joining[0]})"))

    def scale_local(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """This rank's gradients times its factor; zeros where that is 0, whatever they are."""
        if self.refused:
            raise RuntimeError(self.refused)
        self.joining.update(find_joining(variables))
        self.check_padded()
        self.note_pass(True)
        return self._multiply_all(gradients, 0)

    def note_pass(self, made: Any) -> None:
        """Count a pass, if ``made``: one whose gradients are scaled, or not finite and left out."""
        self._used.assign(self._used.read() + tf.cast(made, tf.int64))

    def counts_as_finite(self, finite: Any) -> tf.Tensor:
        """Whether this rank's gradients are ``finite``, or count as zeros whatever they are."""
        return tf.logical_or(finite, tf.equal(self._factors.read()[0], 0))

    def scale_reduced(self, gradients: Sequence[Any]) -> list[Any]:
        """The reduced gradients times the factor of all."""
        return self._multiply_all(gradients, 1)

    def _multiply_all(self, gradients: Sequence[Any], which: int) -> list[Any]:
        factor = self._factors.read()[which]
        return [_multiply(gradient, factor) for gradient in gradients]

    def passes_scaled(self) -> int:
        """How many passes have been scaled so far."""
        return int(self._used.read_numbers()[0])


class Uneven:
    """What ``with hvd.uneven_inputs(optimizer) as data`` gives; :meth:`batches` is to be iterated over.

    Without ``with``, :meth:`padded` makes a dataset for ``model.fit``.
    """

    def __init__(self, optimizer: Any, average_over: str) -> None:
        wrapper = keras_hooks.wrapper_of(optimizer) if isinstance(optimizer, keras.Optimizer) else None
        if wrapper is None:
            raise TypeError("hvd.uneven_inputs takes the optimizer that hvd.DistributedOptimizer returned (a "
                            "tape "
                            f"cannot be told of other ranks' batches), got {optimizer!r}")
        self._collectives = wrapper.collectives
        if self._collectives.is_elastic:
            raise NotImplementedError("hvd.uneven_inputs cannot follow a change of the number of ranks in "
                                      "the "
                                      "TensorFlow front end; run without Horovod elastic")
        if wrapper.reducer.staleness:
            raise ValueError(OVERLAP_UNSUPPORTED_MSG)
        settings, passes = wrapper.reducer.settings, wrapper.options.passes
        plain = isinstance(settings, DenseReduction)
        linear = plain or isinstance(settings, (TopK, PowerSGD))
        check_weighting(average_over, reduction=public_op(settings.op) if plain else public_name(settings),
                        whole=linear,
                        weighable=settings.op == horovod.Average if plain
                        else linear or (isinstance(settings, DelayCompensated) and passes == 1))
        self._linear = linear
        self._reducer = wrapper.reducer
        self._weighing = GradientWeighting(average_over, self._collectives.size)
        if wrapper.scaling is None:
            wrapper.scaling = Scaling()
        self._scaling: Scaling = wrapper.scaling
        self._open = self._ended = False

    def __enter__(self) -> Uneven:
        self._open, self._ended = True, False
        self._scaling.refused = ("a step inside of `with hvd.uneven_inputs(optimizer) as data` that is not "
                                 "on one "
                                 "of its batches: iterate over data.batches(dataset)")
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._open, self._scaling.refused = False, None
        self._scaling.set_factors(1.0, 1.0)
        if kind is None and not self._ended:
            self._leave_loop()
            raise RuntimeError("this rank left `with hvd.uneven_inputs(...) as data` before "
                               "data.batches(dataset) "
                               "had ended: all ranks go on until no rank has a batch; leave out the break, "
                               "and give fewer batches instead")

    def batches(self, dataset: Iterable[Any]) -> Iterator[Any]:
        """The dataset's batches, and then some of them again until no rank has any left.

        Args:
            dataset: a ``tf.data.Dataset``, or anything that gives batches. Their first axis is that of
                the samples.

        Raises:
            RuntimeError: on every rank, when one leaves the loop early; or when the step was traced before
                ``hvd.uneven_inputs`` was first called.
            ValueError: the ranks' ``average_over=`` differ; or a rank has no batch at all and its dataset
                does not say what one looks like.
        """
        if not self._open:
            raise RuntimeError("batches() outside of its block: `with hvd.uneven_inputs(optimizer) as data:`")
        iterator, last = iter(dataset), None
        while True:
            try:
                batch = next(iterator, None)
                if batch is None and last is None:
                    last = _first_batch(dataset)
            except Exception:  # the user's data: anything can come, and the others must hear of it
                self._leave_loop()
                raise
            mine = batch is not None
            samples = _count_samples(batch) if mine else 0
            active, total = self._sum_attendance(mine, samples)
            if active == 0:
                self._ended = True
                return
            self._scaling.set_factors(*self._scale_factors(mine, samples, active, total))
            used, refused = self._scaling.passes_scaled(), self._scaling.refused
            last = batch if mine else last
            self._scaling.refused = None
            yield last
            self._scaling.refused = refused
            if self._scaling.passes_scaled() == used:
                raise RuntimeError("no gradients were scaled in this step: call hvd.uneven_inputs(optimizer) "
                                   "once "
                                   "before the first step, so that the traced step has them scaled, and "
                                   "make one step for each batch")

    def padded(self, dataset: Any) -> Any:
        """The dataset for ``model.fit``, with as many batches as the longest of the ranks' has.

        A rank that has run out sees its first batch again with the sample weight 0, and ``average_over`` goes
        into the sample weights of all; without a ``with``, and for as many epochs as there are. Every rank
        calls it, before ``fit``. The numbers of batches are exchanged once: they must not change from
        epoch to epoch. A dataset that does not know its own, and any with ``average_over="samples"``, is read
        once for it. Unlike a loss, ``metrics`` do not go by sample weights; ``weighted_metrics`` do.

        Args:
            dataset: a ``tf.data.Dataset`` of (inputs, targets) or (inputs, targets, sample weights),
                whose first axis is that of the samples.

        Raises:
            TypeError: it is anything else.
            ValueError: on every rank, when a rank's has no end, none has a batch or ``average_over=``
                differs; or where the reduction is not linear in each rank's gradient and ``average_over``
                is not "ranks"; or, here or in ``fit``, where a batch would be seen again and the model has a
                SyncBatchNormalization.
            RuntimeError: on every rank but that one, when a rank's cannot be read.
        """
        if not self._linear and self._weighing.by != "ranks":
            raise ValueError(f"padded() with average_over={self._weighing.by!r} needs a reduction that is "
                             "linear in "
                             "each rank's gradient; use average_over='ranks', or batches() in a loop")
        made, again = pad_dataset(dataset, self._collectives, self._weighing)
        if again:
            self._scaling.joining.update(find_trained_layers(self._reducer.variables))
            self._scaling.padded.add(made)
            try:
                self._scaling.check_padded()
            except ValueError:
                self._scaling.padded.discard(made)
                raise
        return made

    def _scale_factors(self, mine: bool, samples: int, active: int, total: float) -> tuple[float, float]:
        """Before and after the reduction. Of a linear one all can be put before, pass by pass."""
        before, after = self._weighing.local_factor(samples, total), self._weighing.global_factor(active)
        if self._linear:
            before, after = before * after, 1.0
        return (before if mine else 0.0), after

    def _sum_attendance(self, active: bool, samples: int, left: bool = False) -> tuple[int, float]:
        """How many ranks have a batch, and the samples of all."""
        by = WEIGHTS.index(self._weighing.by)
        words = [active, samples, left, left * self._collectives.rank, *(by == one for one in range(3))]
        WATCH.start_watching(horovod.rank(), horovod.shutdown, horovod.is_initialized)
        WATCH.start_wait("the ranks that have a batch (hvd.uneven_inputs)")
        try:
            total = self._collectives.allreduce(tf.constant([float(one) for one in words], tf.float64),
                                                "hvd_ext/uneven", op=horovod.Sum, kind="agreement").numpy()
        finally:
            WATCH.end_wait()
        if total[2] and not left:
            self._ended = True
            who = f"rank {int(total[3])}" if total[2] == 1 else f"{int(total[2])} ranks"
            raise RuntimeError(f"{who} left data.batches(dataset) of hvd.uneven_inputs before it had ended, "
                               "so that "
                               "the others cannot go on; see the error there")
        if not left and total[4 + by] != self._weighing.ranks:
            self._ended = True
            raise ValueError("the ranks' average_over= of hvd.uneven_inputs differ, this one has "
                             f"{self._weighing.by!r}; "
                             "give all of them the same")
        return int(total[0]), float(total[1])

    def _leave_loop(self) -> None:
        """Tell the others, who would wait for this rank."""
        self._ended = True
        if self._collectives.size > 1:
            self._sum_attendance(False, 0, left=True)


@refuse_old_names(weigh="average_over=")
def uneven_inputs(optimizer: Any, average_over: str = "ranks") -> Uneven:
    """Loop over an epoch's batches, whose number may differ by rank; every rank enters and leaves it.

    ::

        with hvd.uneven_inputs(optimizer, average_over="samples") as data:
            for x, y in data.batches(dataset):
                step(x, y)                            # eager, or a tf.function

    A rank that has run out of batches goes through the step with its last one, its gradients counted
    as zeros (TopK and PowerSGD go on sending its residual), and makes every update, so that weights,
    iterations and schedules stay the same on all ranks; the loop ends on all of them together. What the
    step itself adds up, such as metrics, sees that batch again. ``model.fit`` takes
    ``hvd.uneven_inputs(optimizer).padded(dataset)``.

    Args:
        optimizer: one that ``hvd.DistributedOptimizer`` returned; before its first step is traced.
        average_over: what the mean is taken over. "ranks": all of them, as if those without a batch had
            gradients
            of zero. "active": those that have a batch. "samples": every rank's gradient weighs as many
            samples as its batch has, so that means over batches become the mean over all samples.

    Raises:
        TypeError: the optimizer is not distributed.
        ValueError: an unknown ``average_over``, or one that the optimizer's reduction has no meaning for.
        NotImplementedError: under Horovod elastic.
    """
    return Uneven(optimizer, average_over)


def join() -> Any:
    """Wait for all ranks, as Horovod's ``join``; the result is the last rank to join.

    A rank that waits takes part in the others' allreduces with zeros. Where an optimizer of this process
    has an extension, that is impossible, and all ranks have to come here after the same number of steps.

    Raises:
        RuntimeError: an extension is in use, and another rank trains on, or this is inside a graph.
    """
    extensions = in_use(JOIN_BLOCKERS)
    if extensions and horovod.size() > 1:
        _await_all_ranks(JOIN_BLOCKERS[extensions[0]])
    return horovod.join()


def _await_all_ranks(extension: str) -> None:
    if not tf.executing_eagerly():
        raise RuntimeError(f"hvd.join() with {extension} inside of a graph; call it outside, where it "
                           "can wait for all ranks")
    WATCH.start_watching(horovod.rank(), horovod.shutdown, horovod.is_initialized)
    # Under another process set a rank may well train on without this one. Nothing else can be under way:
    # graphs end with their exchanges.
    global_only = len(horovod.mpi_ops._basics._get_process_set_ids_and_ranks()) == 1
    WATCH.start_wait(join_barrier.NAME)
    try:
        with join_barrier.fail_if_a_rank_trains_on(extension, idle=lambda: global_only):
            horovod.allreduce(tf.ones(1), name=join_barrier.NAME, op=horovod.Sum)
    finally:
        WATCH.end_wait()


def _multiply(gradient: Any, factor: tf.Tensor) -> Any:
    """A gradient times a 0-D number; zeros where that is 0."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(_multiply(gradient.values, factor), gradient.indices, gradient.dense_shape)
    if gradient is None:
        return None
    gradient = tf.convert_to_tensor(gradient)
    factor = tf.cast(factor, gradient.dtype)
    return tf.where(tf.equal(factor, 0), tf.zeros_like(gradient), gradient * factor)


def _count_samples(batch: Any) -> int:
    return int(tf.shape(tf.nest.flatten(batch)[0])[0])


def _first_batch(dataset: Any) -> Any:
    if not hasattr(dataset, "element_spec"):
        raise ValueError("this rank has no batch at all, and its dataset does not say what one looks like: "
                         "give a tf.data.Dataset, or at least one batch")
    return empty_batch(dataset)

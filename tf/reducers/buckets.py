"""Reducers whose gradients travel in flat buckets, each exchanged as soon as its gradients are there."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvd_ext.agreement import digest
from hvd_ext.buckets import (
    DEFAULT_BUCKET_BYTES,
    Bucket,
    Kind,
    TensorSpec,
    plan_buckets,
    split_groups,
)
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reducers.base import Gradient, MakeVariable, Reducer
from hvd_ext.tensorflow.variables import as_tf, name_of


class BucketReducer(Reducer):
    """Plans buckets, fills them, and makes the ranks agree before any result is used.

    Subclasses make their state (``make_state``) and turn this rank's flat buckets into reduced
    ones (``exchange``). A variable without a gradient takes part with zeros.
    """

    def __init__(self, collectives: Collectives, prefix: str, *, settings: Any,
                 bucket_bytes: int = DEFAULT_BUCKET_BYTES, groups: Any = None,
                 sparse_as_dense: bool = False) -> None:
        super().__init__(collectives, prefix)
        if collectives.elastic:
            raise NotImplementedError(
                f"{prefix} cannot follow a change of the number of ranks in the TensorFlow front "
                "end; run without Horovod elastic, or leave the extension out")
        self.settings = settings
        self.bucket_bytes = bucket_bytes
        self.groups = groups
        self.sparse_as_dense = sparse_as_dense
        self.specs: list[TensorSpec] = []
        self.buckets: list[Bucket] = []
        self.steps: Any = None
        self._checked: Any = None
        self._number: dict[int, int] = {}

    # State

    def build(self, variables: Sequence[Any], make_variable: MakeVariable) -> None:
        super().build(variables, make_variable)
        self._number = {id(as_tf(variable)): index for index, variable in enumerate(variables)}
        self.specs = [self.spec(variable) for variable in variables]
        self.buckets = plan_buckets(self.specs, bucket_bytes=self.bucket_bytes,
                                    groups=split_groups(self.groups, variables,
                                                        key=lambda one: id(as_tf(one))))
        self.steps = make_variable((), tf.int64, "steps", False)
        self.stamp = make_variable((2,), tf.int64, "rank_and_ranks", True)
        self.stamp.assign([self.collectives.rank, self.collectives.size])
        self._checked = tf.Variable(False, trainable=False)
        self.make_state(make_variable)

    def spec(self, variable: Any) -> TensorSpec:
        """The variable as the plan sees it."""
        value = as_tf(variable)
        return TensorSpec(name_of(variable), tuple(value.shape), value.dtype.size,
                          Kind(value.dtype.name))

    @abc.abstractmethod
    def make_state(self, make_variable: MakeVariable) -> None:
        """Make the variables of this rank's state, one or more a bucket."""

    @abc.abstractmethod
    def per_rank_state(self) -> list[tf.Variable]:
        """The variables that belong to this rank alone."""

    def reset_per_rank_state(self) -> None:
        """Start the state of this rank anew."""
        for variable in self.per_rank_state():
            variable.assign(tf.zeros_like(variable))
        self.stamp.assign([self.collectives.rank, self.collectives.size])

    # The step

    def reduce(self, gradients: list[Gradient], variables: Sequence[Any],
               **inputs: Any) -> tuple[list[Gradient], Any]:
        given = {self._index(variable): self._dense(gradient, variable)
                 for gradient, variable in zip(gradients, variables, strict=True)}
        flats = [self._fill(bucket, given) for bucket in self.buckets]
        if self.collectives.size > 1:
            gate = tf.cond(self._checked, lambda: tf.constant(True), self._check_plan)
            with tf.control_dependencies([gate]):
                flats = [tf.identity(flat) for flat in flats]
        reduced, good = self.exchange(flats, **inputs)
        pieces: dict[int, tf.Tensor] = {}
        for bucket, flat in zip(self.buckets, reduced, strict=True):
            for slot in bucket.slots:
                piece = flat[slot.offset:slot.offset + slot.numel]
                pieces[slot.index] = tf.reshape(piece, self.specs[slot.index].shape)
        return [tf.cast(pieces[self._index(variable)], as_tf(variable).dtype)
                for variable in variables], good

    def _index(self, variable: Any) -> int:
        return self._number[id(as_tf(variable))]

    def _dense(self, gradient: Gradient, variable: Any) -> tf.Tensor:
        if isinstance(gradient, tf.IndexedSlices):
            if not self.sparse_as_dense:
                raise ValueError(
                    f"the gradient of {name_of(variable)} is a tf.IndexedSlices, which "
                    f"{type(self).__name__.removesuffix('Reducer')} cannot take; pass "
                    "sparse_as_dense=True")
            return tf.convert_to_tensor(gradient)
        return gradient

    def _fill(self, bucket: Bucket, given: dict[int, tf.Tensor]) -> tf.Tensor:
        """The bucket's gradients one after another; micro-batches, if any, along the first axis."""
        pieces = []
        for slot in bucket.slots:
            gradient = given.get(slot.index)
            if gradient is None:
                gradient = tf.zeros(self.parts_shape() + self.specs[slot.index].shape,
                                    as_tf(self.variables[slot.index]).dtype)
            pieces.append(tf.reshape(gradient, (*self.parts_shape(), slot.numel)))
        return tf.concat(pieces, axis=-1)

    def parts_shape(self) -> tuple[int, ...]:
        """Leading shape of the gradients given: (micro-batches,) or ()."""
        return ()

    @abc.abstractmethod
    def exchange(self, flats: list[tf.Tensor], **inputs: Any) -> tuple[list[tf.Tensor], Any]:
        """The reduced flat buckets, and whether the step may be taken (None: always)."""

    # Agreement of the ranks

    def _check_plan(self) -> tf.Tensor:
        """On the first step, before anything else is sent: all ranks plan the same exchange."""
        mine = digest(type(self).__name__, self.settings, self.bucket_bytes, self.specs)
        digests = self.collectives.allgather(tf.constant([mine], tf.int64), f"{self.prefix}/plan",
                                             kind="agreement", rows=self.collectives.size)
        alike = tf.reduce_all(tf.equal(digests, mine))
        check = tf.debugging.Assert(alike, [
            "the ranks do not train the same variables in the same way: give every rank the same "
            "model, optimizer and settings; digests by rank:", digests])
        with tf.control_dependencies([check] if check is not None else []):
            return tf.identity(self._checked.assign(True))

    def agree(self, values: Sequence[Any]) -> tf.Tensor:
        """Exchange a few numbers a rank; (M, len(values)) float64.

        The ranks also find out here when one of them has loaded another rank's state, or another
        step's: that is an error on all.
        """
        ranks = self.collectives.size
        own = tf.reduce_all(tf.equal(
            self.stamp, tf.constant([self.collectives.rank, ranks], tf.int64)))
        row = tf.stack([tf.cast(own, tf.float64), tf.cast(self.steps, tf.float64),
                        *[tf.cast(value, tf.float64) for value in values]])
        rows = row[None]
        if ranks > 1:
            rows = self.collectives.allgather(rows, f"{self.prefix}/agree", kind="agreement",
                                              rows=ranks)
        fine = tf.logical_and(tf.reduce_all(rows[:, 0] == 1.0),
                              tf.reduce_all(rows[:, 1] == rows[0, 1]))
        check = tf.debugging.Assert(fine, [
            "the ranks did not load states that belong together: save and load one file a rank, "
            "on the same number of ranks, or call optimizer.reset_per_rank_state(); "
            "(own state, step) by rank:", rows[:, :2]])
        with tf.control_dependencies([check] if check is not None else []):
            return tf.identity(rows[:, 2:])

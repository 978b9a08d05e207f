"""Reducers whose gradients travel in flat buckets, each exchanged as soon as its gradients are there.

A subclass says how one bucket is exchanged (``start``) and what becomes of the answers
(``complete``); planning, filling, agreement of the ranks and handing back are here.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from hvd_ext.consistency.fingerprint import Fingerprint
from hvd_ext.reducers import registry
from hvd_ext.reducers.buckets import (
    DEFAULT_BUCKET_BYTES,
    Bucket,
    BucketKey,
    TensorSlice,
    TensorSpec,
    plan_buckets,
    split_groups,
)
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.state import STEPS
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reducers.base import Gradient, MakeVariable, Reducer
from hvd_ext.tensorflow.reducers.gradient_presence import DIFFERENT_VARIABLES
from hvd_ext.tensorflow.uneven_data import JOIN_BLOCKERS
from hvd_ext.tensorflow.variables import as_tf, name_of

OTHER_STATES = (
    "the ranks did not load states that belong together: before the first step broadcast model.variables "
    "and optimizer.variables with hvd.broadcast_variables, or save and load one file per rank, on the same "
    "number of ranks")
Started = Mapping[tuple[int, int], Any]
"""What ``start`` returned, by (number of the bucket, part of the step)."""


class BucketReducer(Reducer):
    """Plans buckets, fills them, and makes the ranks agree before any result is used.

    A variable without a gradient takes part with zeros. A step has ``parts`` parts, each an
    exchange of its own: one, unless every micro-batch is.
    """

    def __init__(self, collectives: Collectives, settings: Any, options: ReductionOptions) -> None:
        super().__init__(collectives, settings, options)
        JOIN_BLOCKERS[self] = registry.public_name(settings)
        self.bucket_bytes = getattr(settings, "bucket_bytes", DEFAULT_BUCKET_BYTES)
        self.specs: list[TensorSpec] = []
        self.buckets: list[Bucket] = []
        self.steps: Any = None

    # What a subclass says

    @property
    def parts(self) -> int:
        """How many parts a step has."""
        return 1

    def bucket_key(self, variable: Any) -> BucketKey:
        """What the variable shares with all others of its bucket."""
        return BucketKey(as_tf(variable).dtype.name)

    def make_state(self, make_variable: MakeVariable) -> None:
        """Make the variables of this rank's state, one or more per bucket."""

    @abc.abstractmethod
    def start_exchange(self, bucket: Bucket, part: int, flat: tf.Tensor) -> Any:
        """Start the exchange of a bucket that is full; what it returns goes to ``complete``."""

    @abc.abstractmethod
    def finish_exchange(self, started: Started, **inputs: Any) -> tuple[list[tf.Tensor], Any]:
        """The reduced flat buckets, the same on every rank, and whether the step may be taken.

        The second result is a 0-D bool, or None when it always may.
        """

    # Planning

    def create_state(self, variables: Sequence[Any], make_variable: MakeVariable) -> None:
        super().create_state(variables, make_variable)
        self.specs = [TensorSpec(name_of(one), tuple(as_tf(one).shape), as_tf(one).dtype.size,
                                 self.bucket_key(one)) for one in variables]
        groups = split_groups(self.options.groups, variables, key=lambda one: id(as_tf(one)))
        self.buckets = plan_buckets(self.specs, bucket_bytes=self.bucket_bytes, groups=groups)
        self.steps = self.make_part(make_variable, STEPS)
        self.stamp = make_variable((2,), tf.int64, "rank_and_ranks", True)
        self.stamp.assign([self.collectives.rank, self.collectives.size])
        self.make_state(make_variable)

    def fill_missing(self, gradients: Sequence[Gradient | None], variables: Sequence[Any]
                     ) -> list[Gradient | None]:
        """Zeros for missing gradients: other ranks may have one, or a residual is to be sent.

        Raises:
            ValueError: these are not the variables that the exchange was planned for.
        """
        self.check_variables(variables, registry.public_name(self.settings))
        return [self.zero_gradient(variable) if gradient is None else gradient
                for gradient, variable in zip(gradients, variables, strict=True)]

    def __call__(self, gradients: Sequence[Gradient | None], variables: Sequence[Any],
                 **inputs: Any) -> tuple[list[Gradient | None], Any]:
        filled = self.fill_missing(gradients, variables)
        return super().__call__(filled, variables, **inputs)

    def parts_shape(self) -> tuple[int, ...]:
        return (self.parts,) if self.parts > 1 else ()

    # The step

    def reduce(self, gradients: list[Gradient], variables: Sequence[Any],
               **inputs: Any) -> tuple[list[Gradient], Any]:
        self.check_variables(variables, registry.public_name(self.settings))
        given = {self._bucket_index(variable): self.dense_gradient(gradient, variable)
                 for gradient, variable in zip(gradients, variables, strict=True)}
        flats = {(bucket.index, part): flat for bucket in self.buckets
                 for part, flat in enumerate(self._flatten_bucket(bucket, given))}
        if self.collectives.size > 1:
            with tf.control_dependencies([self.check_consistency()]):
                flats = {key: tf.identity(flat) for key, flat in flats.items()}
        started = {(index, part): self.start_exchange(self.buckets[index], part, flat)
                   for (index, part), flat in flats.items()}
        reduced, good = self.finish_exchange(started, **inputs)
        self.count_step(good)
        pieces: dict[int, tf.Tensor] = {}
        for bucket, flat in zip(self.buckets, reduced, strict=True):
            for slot in bucket.slots:
                pieces[slot.index] = tf.reshape(slot.slice_of(flat), self.specs[slot.index].shape)
        return [tf.cast(pieces[self._bucket_index(variable)], as_tf(variable).dtype)
                for variable in variables], good

    def count_step(self, good: Any) -> None:
        """Count this step, unless ``good`` says that it is skipped; None where it never is."""
        self.steps.assign_add(1 if good is None else tf.cast(good, tf.int64))

    def _bucket_index(self, variable: Any) -> int:
        return self._number[id(as_tf(variable))]

    def dense_gradient(self, gradient: Gradient, variable: Any) -> tf.Tensor:
        """The gradient as a dense tensor.

        Raises:
            ValueError: it is sparse and ``sparse_as_dense`` is not set.
        """
        if isinstance(gradient, tf.IndexedSlices):
            if not self.options.sparse_as_dense:
                raise ValueError(
                    f"the gradient of {name_of(variable)} is a tf.IndexedSlices, which "
                    f"{registry.public_name(self.settings)} cannot take; pass "
                    "sparse_as_dense=True")
            return tf.convert_to_tensor(gradient)
        return gradient

    def _flatten_bucket(self, bucket: Bucket, given: dict[int, tf.Tensor]) -> list[tf.Tensor]:
        """The bucket's gradients one after another, (numel,), for each part of the step."""
        pieces = []
        for slot in bucket.slots:
            gradient = given.get(slot.index)
            if gradient is None:
                gradient = tf.zeros(self.parts_shape() + self.specs[slot.index].shape,
                                    as_tf(self.variables[slot.index]).dtype)
            pieces.append(tf.reshape(gradient, (*self.parts_shape(), slot.numel)))
        flat = tf.concat(pieces, axis=-1)
        return tf.unstack(flat, num=self.parts) if self.parts > 1 else [flat]

    # Variables that are left out: what is kept of them waits

    def without_left_out(self, bucket: Bucket, flat: tf.Tensor) -> tf.Tensor:
        """A flat bucket with zeros where variables are left out."""
        return self._join_given(bucket, flat, lambda slot: tf.zeros_like(slot.slice_of(flat)))

    def keep_left_out(self, bucket: Bucket, after: tf.Tensor, before: tf.Tensor) -> tf.Tensor:
        """``after``, plus ``before`` where variables are left out."""
        return self._join_given(bucket, after, lambda slot: slot.slice_of(after) + slot.slice_of(before))

    def _join_given(self, bucket: Bucket, flat: tf.Tensor,
                    of_left_out: Callable[[TensorSlice], tf.Tensor]) -> tf.Tensor:
        if not any(slot.index in self.left_out for slot in bucket.slots):
            return flat
        return tf.concat([of_left_out(slot) if slot.index in self.left_out else slot.slice_of(flat)
                          for slot in bucket.slots], axis=0)

    # Agreement of the ranks

    def build_fingerprint(self) -> Fingerprint:
        """What must be the same on every rank."""
        return Fingerprint((
            *registry.describe_reduction(self.settings),
            f"half precision: {self.options.half}", f"{self.parts} parts per step",
            *(f"{number}. {list(spec.shape)} {spec.kind}" for number, spec in enumerate(self.specs))))

    def agree(self, values: Sequence[Any]) -> tf.Tensor:
        """Exchange a few numbers per rank; (M, len(values)) float64.

        The ranks also find out here when one of them has loaded another rank's state, or another
        step's: that is an error on all ranks.
        """
        ranks = self.collectives.size
        own = tf.reduce_all(tf.equal(
            self.stamp, tf.constant([self.collectives.rank, ranks], tf.int64)))
        row = tf.stack([tf.cast(own, tf.float64), tf.cast(self.steps, tf.float64),
                        tf.constant(self.left_out_number(), tf.float64),
                        *[tf.cast(value, tf.float64) for value in values]])
        rows = row[None]
        if ranks > 1:
            rows = self.collectives.allgather(rows, f"{self.prefix}/{self.settings.label}/agree",
                                              kind="agreement", rows=ranks)
        fine = tf.logical_and(tf.reduce_all(rows[:, 0] == 1.0),
                              tf.reduce_all(rows[:, 1] == rows[0, 1]))
        check = tf.debugging.Assert(fine, [
            f"{OTHER_STATES}; (own state, step) by rank:", rows[:, :2]])
        alike = tf.debugging.Assert(tf.reduce_all(rows[:, 2] == rows[0, 2]),
                                    [DIFFERENT_VARIABLES, rows[:, 2]])
        with tf.control_dependencies([one for one in (check, alike) if one is not None]):
            return tf.identity(rows[:, 3:])

    # Figures

    def report(self) -> dict[str, Any]:
        return {"steps": read_counter(self.steps), "buckets": len(self.buckets),
                "bytes_held": self.bytes_held()}


def read_counter(counter: Any) -> int:
    """A counter's value, 0 before the first step has made it."""
    return 0 if counter is None else int(counter)

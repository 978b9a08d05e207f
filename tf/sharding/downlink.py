"""Compressed replies of a server: what an owner keeps and sends, and how all ranks apply it.

w - w^ -> compress -> send -> every rank, the owner too: w^ += what was sent

The model's variables hold w^. ``exact`` is w of what this rank owns, a variable of the optimizer; while the
wrapped optimizer updates it the model's variable holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_ext.reducers.buckets import Bucket, BucketKey, TensorSpec, plan_buckets
from hvd_ext.reducers.filters import check_names
from hvd_ext.reducers.topk import Layout
from hvd_ext.reducers.topk.plan import Segment, plan_segments
from hvd_ext.sharding import Server
from hvd_ext.sharding.downlink import REPLY, message_layout, route_weights
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reducers.kernels.topk import wire_dtype
from hvd_ext.tensorflow.sharding import downlink_kernels as kernels
from hvd_ext.tensorflow.variables import as_tf, name_of

EXACT, HELD = "exact", "held"  # the optimizer's variables for w, and for what w^ was left as


def check_optimizer(settings: Server, optimizer: Any) -> None:
    """Refuse what replies cannot serve here.

    Raises:
        NotImplementedError: averages of weights, or a ratio that is a function.
    """
    if settings.downlink is None:
        return
    if optimizer.use_ema:
        raise NotImplementedError("downlink= with use_ema=True: the averages would be those of w^, not of "
                                  "the "
                                  "exact weights; leave one of them out")
    if not settings.half and callable(settings.downlink.ratio):
        raise NotImplementedError("a reply whose ratio is a function of the step is in hvd_ext.torch only; "
                                  "give a number")


@contextmanager
def exact_weights(optimizer: Any) -> Iterator[None]:
    """Within the block the variables hold the exact weights, where the server's replies are compressed.

    After it they hold again what the ranks share and take gradients at. For evaluation and saving; a
    collective: enter it on every rank, between two steps.
    """
    server = optimizer._hvd_ext.server
    if server is None or server.replies is None:
        yield
        return
    with server.replies.exact_weights():
        yield


class CompressedDownlink:
    """Compressed replies of one server.

    Args:
        settings: of the server; its ``reply`` is not None.
        collectives: the ranks.
    """

    def __init__(self, settings: Server, collectives: Collectives) -> None:
        self.settings = settings
        self.collectives = collectives
        self.variables: list[Any] = []
        self.buckets: list[Bucket] = []
        self._exact: dict[int, tf.Variable] = {}
        self._held: dict[int, tf.Variable] = {}
        self._iterations: Any = None

    @property
    def active(self) -> bool:
        """Whether there is anybody to reply to."""
        return self.collectives.size > 1

    def plan_buckets(self, variables: Sequence[Any], owner: Callable[[Any], int]) -> None:
        """Take the served variables that come back compressed, in buckets of one owner each.

        Raises:
            ValueError: a pattern of ``exclude`` matches no variable.
            NotImplementedError: a variable has a constraint.
        """
        if not self.settings.half:
            check_names(self.settings.downlink.exclude, [name_of(one) for one in variables])
        self.variables = [one for one in variables if route_weights(
            self.settings, name_of(one), tuple(one.shape), as_tf(one).dtype.name) == REPLY]
        for one in self.variables:
            if getattr(one, "constraint", None) is not None:
                raise NotImplementedError(f"downlink= with a constraint on {name_of(one)}: it would bind w^, "
                                          "not the exact weights; leave one of them out, or exclude the "
                                          "variable")
        specs = [TensorSpec(name_of(one), tuple(one.shape), as_tf(one).dtype.size,
                            BucketKey(as_tf(one).dtype.name, owner=owner(one))) for one in self.variables]
        self.buckets = [bucket for bucket in plan_buckets(specs) if bucket.numel]
        self._mine = [one for one in self.variables if owner(one) == self.collectives.rank]

    def is_compressed(self, variable: Any) -> bool:
        """Whether the variable's new weights come back compressed."""
        return any(as_tf(variable) is as_tf(one) for one in self.variables)

    def create_state(self, optimizer: Any, make: Callable[..., tf.Variable],
                     references: dict[int, tuple[Any, str]],
                     has_room: Callable[[Any], bool]) -> None:
        """Make the variables for w of what this rank owns, in the optimizer; a rank alone needs none."""
        self._iterations = optimizer.iterations
        if not (self.active or self.collectives.is_elastic):
            return
        for number, one in enumerate(self.variables):
            if not has_room(one):
                continue
            key = id(as_tf(one))
            self._exact[key] = make(tuple(one.shape), as_tf(one).dtype, f"{EXACT}_{number}", True)
            self._held[key] = make((2,), tf.int64, f"{HELD}_{number}", True)
            references[id(self._exact[key])] = one, EXACT
            references[id(self._held[key])] = one, HELD

    # Around the update

    def begin_update(self) -> dict[int, tf.Tensor]:
        """Before an update: the variables hold w of what this rank owns. Returns w^ of that."""
        self.detect_external_writes()
        before = {}
        for one in self._mine:
            before[id(as_tf(one))] = tf.identity(as_tf(one).read_value())
            as_tf(one).assign(self._exact[id(as_tf(one))])
        return before

    def detect_external_writes(self) -> None:
        """Let w of variables that have none, or that were set since the last step, be w^."""
        for one in self._mine:
            exact = self._exact[id(as_tf(one))]
            exact.assign(tf.where(self._is_held(one), exact, as_tf(one)))

    def _is_held(self, one: Any) -> tf.Tensor:
        held, bits = self._held[id(as_tf(one))], kernels.bit_sum(as_tf(one).read_value())
        return tf.logical_and(tf.equal(held[0], 1), tf.equal(held[1], bits))

    def apply_local(self) -> None:
        """On a rank that is alone by now: the variables hold w, of which nobody is told."""
        for one in self.variables:
            key = id(as_tf(one))
            if key in self._exact:
                as_tf(one).assign(tf.where(self._is_held(one), self._exact[key], as_tf(one)))
                self._held[key].assign(tf.zeros((2,), tf.int64))

    def build_messages(self, before: dict[int, tf.Tensor], failed: bool) -> list[tuple[int, tf.Tensor]]:
        """After an update: every bucket's owner and message, of no value yet where another rank sends it.

        The variables hold w^ again.
        """
        differences = {}
        for one in self._mine:
            key, variable = id(as_tf(one)), as_tf(one)
            if key not in before:  # the update failed before it began
                continue
            exact = variable.read_value()
            self._exact[key].assign(exact)
            differences[key] = kernels.weight_difference(exact, before[key])
            variable.assign(before[key])
        found = []
        for bucket in self.buckets:
            owner = bucket.kind.owner
            assert owner is not None
            words = self._reply_layout(bucket).words if not self.settings.half else bucket.numel + 1
            dtype = tf.float16 if self.settings.half else tf.int32
            if owner != self.collectives.rank:
                found.append((owner, tf.raw_ops.Empty(shape=[words], dtype=dtype, init=False)))
                continue
            wide = kernels.wide_dtype(tf.as_dtype(bucket.kind.dtype))
            parts = [differences.get(id(as_tf(one)), tf.zeros((slot.numel,), wide))
                     for slot, one in self._bucket_variables(bucket)]
            found.append((owner, self._pack_reply(bucket, tf.concat(parts, axis=0), failed)))
        return found

    def _pack_reply(self, bucket: Bucket, difference: tf.Tensor, failed: bool) -> tf.Tensor:
        if self.settings.half:
            return kernels.pack_half(difference, failed)
        reply = self.settings.downlink
        return kernels.pack_entries(difference, self._reply_segments(bucket), self._reply_layout(bucket),
                                    reply,
                                    (reply.seed, bucket.index), as_tf(self._iterations), failed)

    def _reply_segments(self, bucket: Bucket) -> list[Segment]:
        reply = self.settings.downlink
        return plan_segments(bucket, reply.ratio_at(0), per_tensor=reply.per_tensor)

    def _reply_layout(self, bucket: Bucket) -> Layout:
        return message_layout(self._reply_segments(bucket), self.settings.downlink.values)

    def _bucket_variables(self, bucket: Bucket) -> list[tuple[Any, Any]]:
        return [(slot, self.variables[slot.index]) for slot in bucket.slots]

    def read_statuses(self, sent: Sequence[tf.Tensor]) -> list[tuple[int, tf.Tensor]]:
        """Every bucket's owner, and a 0-D number that is not 0 where its update failed."""
        return [(bucket.kind.owner or 0, message[-1] if self.settings.half else tf.minimum(message[0], 0))
                for bucket, message in zip(self.buckets, sent, strict=True)]

    def apply_replies(self, sent: Sequence[tf.Tensor]) -> None:
        """Add what the owners sent to w^."""
        for bucket, message in zip(self.buckets, sent, strict=True):
            flat = tf.concat([tf.reshape(as_tf(one).read_value(), [-1]) for _,
                              one in self._bucket_variables(bucket)], 0)
            if self.settings.half:
                flat = kernels.add_half(flat, message)
            else:
                flat = kernels.add_entries(flat, message, self._reply_layout(bucket),
                                           wire_dtype(self.settings.downlink))
            for slot, one in self._bucket_variables(bucket):
                as_tf(one).assign(tf.reshape(slot.slice_of(flat), one.shape))
        for one in self._mine:
            bits = kernels.bit_sum(as_tf(one).read_value())
            self._held[id(as_tf(one))].assign(tf.stack([tf.ones((), tf.int64), bits]))

    # w on all ranks

    def gather_exact(self) -> dict[int, np.ndarray]:
        """w of what comes back compressed, by the variable's ``id``; a collective, in no step."""
        if not self._exact and not self.active:
            return {}
        collectives = Collectives(self.collectives.process_set)  # no part of a step's bytes
        if collectives.size == 1:
            self.apply_local()
            return {}
        self.detect_external_writes()
        found = {}
        for bucket in self.buckets:
            for slot, one in self._bucket_variables(bucket):
                own = self._exact.get(id(as_tf(one)), as_tf(one)).read_value()
                found[id(as_tf(one))] = collectives.broadcast(
                    own, bucket.kind.owner or 0, f"server/exact{slot.index}", kind="objects").numpy()
        return found

    @contextmanager
    def exact_weights(self) -> Iterator[None]:
        """Let the variables hold w; w^ again after. A collective."""
        exact = self.gather_exact()
        changed = [(as_tf(one), as_tf(one).numpy()) for one in self.variables if id(as_tf(one)) in exact]
        try:
            for variable, _ in changed:
                variable.assign(exact[id(variable)])
            yield
        finally:
            for variable, before in changed:
                variable.assign(before)

    def report(self) -> dict[str, Any]:
        """Figures of this rank; the norm is of w - w^ of what it owns, once a step was taken."""
        norms, sent = [], 0
        for one in self._mine if self.active else ():
            exact = self._exact[id(as_tf(one))]
            if bool(self._held[id(as_tf(one))][0] == 1):
                norms.append(float(tf.norm(tf.cast(exact, tf.float64) - tf.cast(as_tf(one), tf.float64))))
        for bucket in self.buckets:
            if bucket.kind.owner == self.collectives.rank:
                size = 2 * (bucket.numel + 1) if self.settings.half else 4 * self._reply_layout(bucket).words
                sent += (self.collectives.size - 1) * size
        how = {"compression": "fp16"} if self.settings.half else {
            "compression": "topk", "ratio": self.settings.downlink.ratio_at(0)}
        return {**how, "bytes_sent": sent, "error_norm": math.hypot(*norms),
                "exact_bytes": sum(int(v.shape.num_elements()) * v.dtype.size for v in self._exact.values())}

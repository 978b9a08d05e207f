"""The ranks' comparisons: settings before the first exchange, weights before the second step.

Scripts for TensorFlow and Keras broadcast the first rank's weights before the first step or right after it,
so that the first step is too early to compare them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf

from hvd_ext.consistency import checksum
from hvd_ext.consistency.fingerprint import Fingerprint, digest_parts, mismatch_message
from hvd_ext.consistency.handshake import weights_differ
from hvd_ext.tensorflow.collectives import Collectives, unique_op_name
from hvd_ext.tensorflow.consistency.weight_digest import digest_tensors
from hvd_ext.watchdog.peer_status import StatusServer
from hvd_ext.watchdog.watchdog import WATCH

OUTSIDE_GRAPH = "hvd_ext-outside-graph"  # begins the names of threads that make variables for a graph
_TURN = threading.Condition()
_RECEIVED: dict[tuple[Any, str], dict[int, Any]] = {}  # by process set and subject, each rank's
BROADCAST = ("call hvd.broadcast_variables(model.variables, root_rank=0), or give model.fit "
             "hvd.callbacks.BroadcastGlobalVariablesCallback(0)")


def compare_settings(ranks: Collectives, mine: Fingerprint,
                     what: str = "train the same variables in the same way",
                     remedy: str = "Give every rank the same model, optimizer and settings",
                     prefix: str = "") -> tf.Tensor:
    """Compare what must be the same on all ranks, whatever else they were given; 0-D True.

    A failed comparison is an ``InvalidArgumentError`` on every rank when the function runs. In a thread of
    the script's own it has the optimizer's ``prefix`` in its name: others may be under way at once.
    """
    thread = threading.current_thread()
    shared = thread is threading.main_thread() or thread.name.startswith(OUTSIDE_GRAPH)
    subject = checksum.NAME if shared or not prefix else f"{checksum.NAME}/{prefix}"
    WATCH.start_watching(horovod.rank(), horovod.shutdown, horovod.is_initialized)
    asks = not _know_each_other(ranks)

    def explain(name: str) -> str:
        return mismatch_message(f"the ranks do not {what}", _exchange_objects(ranks, mine.lines, name),
                                remedy)

    return _compare_checksums(ranks, subject, lambda: checksum.encode_checksum(mine.number, asks=asks),
                              [], explain)


def compare_weights(ranks: Collectives, prefix: str, names: Sequence[str],
                    weights: Sequence[tf.Tensor]) -> tf.Tensor:
    """Compare the bits of weights with the other ranks'; 0-D True, an error on every rank as above.

    ``prefix`` belongs to the optimizer: functions that were traced one by one may run side by side.
    """
    kept: list[int] = []

    def words(*values: Any) -> Any:
        kept[:] = digest_tensors(values)
        return checksum.encode_checksum(digest_parts(kept))

    def explain(name: str) -> str:
        return weights_differ(_exchange_objects(ranks, tuple(zip(names, kept, strict=True)), name), BROADCAST)

    return _compare_checksums(ranks, f"{prefix}/weights", words, weights, explain)


def _compare_checksums(ranks: Collectives, name: str, words: Callable[..., Any], values: Sequence[tf.Tensor],
                       explain: Callable[[str], str]) -> tf.Tensor:
    name = unique_op_name(name)
    # No tf.constant: Horovod's operations are not marked as stateful, and on constants alone TensorFlow
    # runs them while it prepares the graph, on this rank alone and also where the condition is false.
    mine = tf.ensure_shape(tf.numpy_function(words, list(values), tf.int64), (checksum.WORDS,))
    total = ranks.allreduce(mine, name, op=horovod.Sum, kind="agreement")

    def compare(total: Any) -> Any:
        if not checksum.all_equal(total):
            raise ValueError(explain(f"{name}/differ"))
        if checksum.is_requested(total, ranks.size):
            _register_rank(ranks, f"{name}/addresses")
        return np.True_

    return tf.ensure_shape(tf.numpy_function(compare, [total], tf.bool), ())


def _know_each_other(ranks: Collectives) -> bool:
    """Whether this rank can ask the others what they do; under elastic they come and go."""
    members = ranks.process_set.ranks
    return ranks.is_elastic or all(rank in WATCH.others for rank in (
        range(ranks.size) if members is None else members))


def _register_rank(ranks: Collectives, name: str) -> None:
    with _TURN:
        if WATCH.listener is None:
            WATCH.listener = StatusServer(local=horovod.local_size() == horovod.size())
    mine = (horovod.rank(), WATCH.listener.address)
    WATCH.others = {**WATCH.others, **dict(_exchange_objects(ranks, mine, name))}


def _exchange_objects(ranks: Collectives, thing: Any, subject: str) -> list[Any]:
    """Every rank's ``thing`` on a subject, by rank.

    Optimizers of one function are compared side by side, in an order that differs by rank, and TensorFlow
    names all eager collectives alike. So ranks exchange one thing at a time, whatever its subject, and each
    waits until all have come to its own.
    """
    number = ranks.process_set.process_set_id
    with _TURN:
        for rank, (about, found) in enumerate(ranks.allgather_object((subject, thing), "hvd_ext.exchange")):
            _RECEIVED.setdefault((number, about), {})[rank] = found
        _TURN.notify_all()
        _TURN.wait_for(lambda: len(_RECEIVED[number, subject]) == ranks.size)
        everyone = _RECEIVED.pop((number, subject))
    return [everyone[rank] for rank in range(ranks.size)]

"""What the watch sees of an exchange inside a graph: also of one that fails."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import tensorflow as tf

from hvd_ext.tensorflow.graph_watchdog import GraphWaitProbe


def exchange(waiting, between):
    """A step whose exchange is ``between``, a Python function of one number."""
    waiting.create_variables()

    @tf.function
    def step(x):
        begun = waiting.start_wait([x])
        y = tf.py_function(between, [x], tf.float32)
        waiting.end_wait(begun, [y])
        return y

    return step


def test_an_exchange_under_way_is_a_wait_until_it_is_over():
    waiting = GraphWaitProbe("an exchange")
    reached, go_on = threading.Event(), threading.Event()

    def between(x):
        reached.set()
        assert go_on.wait(60)
        return x

    step = exchange(waiting, between)
    assert waiting.current_wait() is None
    thread = threading.Thread(target=step, args=(tf.constant(1.0),))
    thread.start()
    assert reached.wait(60)
    # The graph may run ``between`` before it writes when the exchange began: look again, as the watch does.
    seen, deadline = waiting.current_wait(), time.monotonic() + 60
    while seen is None and time.monotonic() < deadline:
        time.sleep(0.01)
        seen = waiting.current_wait()
    go_on.set()
    thread.join(60)
    assert not thread.is_alive()
    assert seen is not None
    assert seen.what == "an exchange"
    assert waiting.current_wait() is None


def test_nobody_waits_for_a_graph_that_has_failed():
    waiting = GraphWaitProbe("an exchange")
    fails = True

    def between(x):
        if fails:
            raise ValueError("not this time")
        return x

    step = exchange(waiting, between)
    with pytest.raises(tf.errors.OpError, match="not this time"):
        step(tf.constant(1.0))
    assert waiting.current_wait() is None
    # Nor later, while this process is in TensorFlow for another reason.
    seen = []
    tf.function(lambda x: tf.py_function(lambda y: (seen.append(waiting.current_wait()), y)[1], [x],
                                         tf.float32))(
        tf.constant(1.0))
    assert seen == [None]
    fails = False
    step(tf.constant(1.0))
    assert waiting.current_wait() is None


def test_an_exchange_does_not_end_before_it_begins():
    waiting = GraphWaitProbe("an exchange")
    step = exchange(waiting, lambda x: x)
    graph = step.get_concrete_function(tf.TensorSpec((), tf.float32)).graph
    first, second = (op for op in graph.get_operations() if op.type == "AssignVariableOp")
    assert first in second.inputs[1].op.control_inputs  # of the time that it sets

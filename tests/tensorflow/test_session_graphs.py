"""Graphs of TensorFlow 1, run in a ``tf.compat.v1.Session``, in processes of their own."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

from tests.ranks import run_ranks

STEPS = 3


def rows(rank):
    rng = np.random.default_rng(rank)
    return rng.normal(size=(4, 3)), rng.normal(size=(4, 1))


def by_numpy(size):
    """Gradient descent on the joined batch, from rank 0's weights, in float64."""
    x, y = (np.concatenate(both) for both in zip(*map(rows, range(size)), strict=True))
    w = np.full((3, 1), 0.5)
    for _ in range(STEPS):
        w = w - 0.1 * 2 * x.T @ (x @ w - y) / len(y)
    return w


def train_in_a_session():
    import tensorflow as tf

    v1 = tf.compat.v1
    v1.disable_eager_execution()
    import hvd_ext.tensorflow as hvd

    hvd.init()
    assert not hvd._executing_eagerly()
    x, y = (tf.constant(one) for one in rows(hvd.rank()))
    found = {}
    for name in ("tape", "tape with fp16", "optimizer"):
        w = v1.get_variable(name.replace(" ", "_"), initializer=np.full((3, 1), 0.5 + hvd.rank()),
                            use_resource=True)
        start = hvd.broadcast_variables([w], root_rank=0)
        if name == "optimizer":
            loss = tf.reduce_mean((x @ w - y) ** 2)
            step = hvd.DistributedOptimizer(v1.train.GradientDescentOptimizer(0.1)).minimize(loss)
        else:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((x @ w - y) ** 2)
            tape = hvd.DistributedGradientTape(
                tape, compression=hvd.Compression.fp16 if "fp16" in name else hvd.Compression.none)
            (gradient,) = tape.gradient(loss, [w])
            step = w.assign_sub(0.1 * gradient)
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            session.run(start)
            for _ in range(STEPS):
                session.run(step)
            found[name] = session.run(w)

    class Preconditioner:
        def precondition(self, *args):
            raise AssertionError

    with tf.GradientTape() as tape:
        pass
    for options, said in [({"op": hvd.DelayCompensated()}, "DelayCompensated"),
                          ({"compression": hvd.Compression.topk(0.1)}, r"Compression\.topk"),
                          ({"compression": hvd.Compression.powersgd(2)}, r"Compression\.powersgd"),
                          ({"preconditioner": Preconditioner()}, "preconditioner=Preconditioner")]:
        with pytest.raises(NotImplementedError, match=said + " in a graph of TensorFlow 1"):
            hvd.DistributedGradientTape(tape, **options)
        asked = said if "=" not in said else "preconditioner="
        with pytest.raises(NotImplementedError, match=asked + " with a tf.compat.v1 optimizer"):
            hvd.DistributedOptimizer(v1.train.GradientDescentOptimizer(0.1), **options)
        with pytest.raises(NotImplementedError, match=said + " in a graph of TensorFlow 1"):
            hvd.DistributedOptimizer(tf.keras.optimizers.SGD(0.1), **options)
    return found


@pytest.mark.distributed
def test_plain_horovod_works_and_extensions_say_that_they_do_not():
    first, second = run_ranks(train_in_a_session, 2, init=None, timeout=100)
    for name, found in first.items():
        np.testing.assert_array_equal(found, second[name])
        np.testing.assert_allclose(found, by_numpy(2), atol=5e-3 if "fp16" in name else 1e-10)

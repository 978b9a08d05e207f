"""The TensorFlow front end, beside a Horovod that runs in the same program."""

import numpy as np
import pytest
import tensorflow as tf

from hvd_ext.reducers.delay_compensation.engine import replay
from hvd_ext.reducers.delay_compensation.update_rules import AsyncRule
from hvd_ext.tensorflow.async_ps import ParameterServer, TensorFlowModel

STEPS = 20


def build():
    """A small Keras network with an embedding, whose gradient is sparse."""
    import keras

    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.layers.Input((3,), dtype="int32"),
                             keras.layers.Embedding(7, 4), keras.layers.Flatten(),
                             keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(3)])


def gradients(model, worker, batch):
    """Of one of a worker's mini-batches."""
    rng = np.random.default_rng([worker, batch])
    x, y = rng.integers(0, 7, (8, 3)), rng.integers(0, 3, 8)
    with tf.GradientTape() as tape:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x))
        loss = tf.reduce_mean(losses)
    return tape.gradient(loss, model.trainable_variables)


def flat(model):
    """All trainable variables (n,)."""
    buffer = TensorFlowModel(model.trainable_variables).new_buffer()
    buffer.take_weights()
    return buffer.read_entries().copy()


def train(options):
    """A run between two allreduces of Horovod."""
    import horovod.tensorflow as hvd

    before = float(hvd.allreduce(tf.constant(float(hvd.rank())), op=hvd.Sum))
    model = build()
    ps = ParameterServer(model, progress=False, **options)
    told = {}
    if ps.is_server:
        ps.serve()
        told["recording"] = ps.recording
    else:
        for batch in range(STEPS):
            ps.step(gradients(model, ps.worker, batch))
        ps.finish()
    told["weights"] = flat(model)
    after = float(hvd.allreduce(tf.constant(float(hvd.rank())), op=hvd.Sum))
    return told, before, after


def replayed(recording):
    """What the delay engine makes of the recorded delays with the same model's gradients."""
    model = build()
    flattened = TensorFlowModel(model.trainable_variables)
    buffer = flattened.new_buffer()

    def gradient(w, k):
        buffer.write_entries(w)
        buffer.put_weights()
        flattened.gradients = gradients(model, int(recording.senders[k]),
                                        int(recording.batches[k]))
        buffer.take_gradients()
        return buffer.read_entries().copy()

    return replay(gradient, flat(model), steps=len(recording), delays=recording, lr=0.1,
                  momentum=0.4, rule=AsyncRule(name="dc-asgd-a", lam=0.2)).weights


@pytest.mark.distributed
def test_run_beside_horovod_replays(ranks):
    options = {"lr": 0.1, "rule": "dc-asgd-a", "lam": 0.2, "momentum": 0.4}
    results = ranks(3, init="tensorflow").run(train, options)
    told = results[0][0]
    assert len(told["recording"]) == 2 * STEPS
    for result, before, after in results:
        assert before == after == 3.0
        np.testing.assert_array_equal(result["weights"], told["weights"])
    np.testing.assert_allclose(told["weights"], replayed(told["recording"]), rtol=0, atol=1e-6)


def test_flat_and_back_keeps_every_entry():
    variables = [tf.Variable(tf.random.normal((2, 3)), dtype=tf.float32),
                 tf.Variable(tf.cast(tf.random.normal((4,)), tf.bfloat16))]
    before = [tf.identity(v) for v in variables]
    model = TensorFlowModel(variables)
    assert model.dtype == np.float32
    buffer = model.new_buffer()
    buffer.take_weights()
    for v in variables:
        v.assign(tf.zeros_like(v))
    buffer.put_weights()
    for v, old in zip(variables, before, strict=True):
        assert bool(tf.reduce_all(v == old))
    model.gradients = [None, tf.fill((4,), tf.constant(2.0, tf.bfloat16))]
    buffer.take_gradients()
    assert buffer.read_entries().tolist() == [0.0] * 6 + [2.0] * 4
    model.gradients = [tf.zeros((3, 2)), None]
    with pytest.raises(ValueError, match=r"variable's shape \(2, 3\), got \(3, 2\)"):
        buffer.take_gradients()
    assert TensorFlowModel([tf.Variable(tf.zeros(2, tf.float64))]).dtype == np.float64
    with pytest.raises(TypeError, match="variable 0 must be real floating point, got int32"):
        TensorFlowModel([tf.Variable([1, 2])])

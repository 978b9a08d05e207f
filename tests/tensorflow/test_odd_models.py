"""Models that are not usual: empty, complex, frozen or unused weights, fewer weights than ranks, bfloat16."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.tensorflow import training  # noqa: E402

pytestmark = pytest.mark.distributed
RATE = 0.25


def topk(ratio=1.0, **options):
    return hvd.Compression.topk(ratio, min_size=0, **options)


METHODS = {
    "plain": dict,
    "sharded": lambda: {"server": "sharded"},
    "topk": lambda: {"compression": topk()},
    "sparse allreduce": lambda: {"compression": topk(exchange="sparse_allreduce")},
    "powersgd": lambda: {"compression": hvd.Compression.powersgd(4, min_compression=1.0)},
    "delay": lambda: {"op": hvd.DelayCompensated(lam=0.0, adaptive=False)},
    "late": lambda: {"overlap": hvd.DelayedUpdate(0.0, adaptive=False)},
}


def empty_weights(method):
    """Two steps with a weight of no elements; rank r's gradients are r + 1 everywhere."""
    variables = [tf.Variable(tf.zeros((0, 3)), name="empty"), tf.Variable(tf.zeros((2, 2)), name="full")]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE), **METHODS[method]())
    for _ in range(2):
        optimizer.apply([tf.ones_like(one) * float(hvd.rank() + 1) for one in variables], variables)
    optimizer.flush()
    return variables[1].numpy().tolist()


def nothing_trainable(method):
    model = training.dense_model()
    model.trainable = False
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE), **METHODS[method]())
    before = training.weights(model)
    model.compile(optimizer, "mse")
    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        model.fit(*(part[:4] for part in training.data()), verbose=0)
    optimizer.flush()
    return all(map(np.array_equal, before, training.weights(model)))


def refused_complex(method):
    variables = [tf.Variable(tf.zeros(3), name="real"),
                 tf.Variable(tf.zeros(3, tf.complex64), name="phases")]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE), **METHODS[method]())
    with pytest.raises(ValueError, match="adds up real numbers") as caught:
        optimizer.build(variables)
    return str(caught.value)


def groups_and_freezing():
    """Three steps with the first of a group's weights frozen in the second."""
    variables = [tf.Variable(0.0, name=f"w{number}") for number in range(3)]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE), groups=[variables[:2]])
    for step in range(3):
        given = variables[step == 1:]
        optimizer.apply([tf.constant(float(hvd.rank() + 1))] * len(given), given)
    return [float(one) for one in variables]


class TwoTables(keras.Model):
    """Two embeddings, of which only the first is used."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = keras.layers.Embedding(6, 2), keras.layers.Embedding(6, 2)
        self.idle.build(())

    def call(self, tokens):
        return tf.reduce_sum(self.used(tokens), axis=1)


def idle_table(method):
    keras.utils.set_random_seed(3)
    model = TwoTables()
    model(tf.zeros((1, 2), tf.int32))
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE, momentum=0.5),
                                         sparse_as_dense=method != "plain", **METHODS[method]())
    before = model.idle.embeddings.numpy()
    model.compile(optimizer, "mse")
    model.fit(np.array([[0, hvd.rank() + 1]] * 4), np.ones((4, 2)), batch_size=2, verbose=0)
    optimizer.flush()
    hvd.assert_replicas_equal(model)
    return np.array_equal(before, model.idle.embeddings.numpy()), model.used.embeddings.numpy()


def idle_table_in_one_process():
    keras.utils.set_random_seed(3)
    model = TwoTables()
    model(tf.zeros((1, 2), tf.int32))
    model.compile(keras.optimizers.SGD(RATE, momentum=0.5), "mse")
    rows = [[0, 1]] * 2 + [[0, 2]] * 2
    model.fit(np.array(rows * 2), np.ones((8, 2)), batch_size=4, shuffle=False, verbose=0)
    return model.used.embeddings.numpy()


def fewer_weights_than_ranks(downlink):
    """One weight on two ranks, of an optimizer that needs it whole."""
    variable = tf.Variable(np.arange(12.0).reshape(4, 3), name="only")
    server = hvd.Server("sharded", downlink=topk(values="float64")) if downlink else "sharded"
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adafactor(0.1), server=server)
    for step in range(3):
        found = np.random.default_rng([step, hvd.rank()]).standard_normal((4, 3))
        optimizer.apply([tf.constant(found)], [variable])
    return variable.numpy()


def every_case():
    return {
        "empty": {method: empty_weights(method) for method in METHODS},
        "frozen": {method: nothing_trainable(method) for method in METHODS},
        "complex": {method: refused_complex(method) for method in METHODS},
        "groups": groups_and_freezing(),
        "idle": {method: idle_table(method) for method in ("plain", "topk", "delay")},
        "few": [fewer_weights_than_ranks(downlink) for downlink in (False, True)],
    }


def test_odd_models(ranks):
    by_rank = ranks(2, init="tensorflow").run(every_case, timeout=280)
    table = idle_table_in_one_process()
    for found in by_rank:
        for method, weights in found["empty"].items():
            np.testing.assert_allclose(weights, np.full((2, 2), -2 * RATE * 1.5), rtol=1e-6, err_msg=method)
        assert all(found["frozen"].values()), found["frozen"]
        for method, said in found["complex"].items():
            assert "phases" in said, (method, said)
            assert "complex64" in said, (method, said)
        assert found["groups"] == [-2 * 1.5 * RATE, -3 * 1.5 * RATE, -3 * 1.5 * RATE]
        for method, (still, used) in found["idle"].items():
            assert still, method
            np.testing.assert_allclose(used, table, rtol=1e-5, atol=1e-6, err_msg=method)
        np.testing.assert_allclose(found["few"][0], found["few"][1], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(found["few"][1], by_rank[0]["few"][1])


def half_model():
    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.Input((5,), dtype="bfloat16"), keras.layers.Dense(8, dtype="bfloat16"),
                              keras.layers.Dense(3, dtype="bfloat16")])
    model.compile(hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.1, momentum=0.5), server=hvd.Server("sharded", downlink=topk(0.3))), "mse")
    return model


def half_bits(model):
    with model.optimizer.exact_weights():
        exact = [np.array(weight.value).view(np.uint16).tolist() for weight in model.weights]
    return exact, [np.array(weight.value).view(np.uint16).tolist() for weight in model.weights]


def half_checkpoint(folder):
    """Bits of bfloat16 weights as they are trained, as saved and as they go on."""
    x, y = (part[:8][hvd.rank()::2] for part in training.data())
    model, again = half_model(), half_model()
    for _ in range(3):
        model.train_on_batch(x, y)
    hvd.save_checkpoint(folder, 3, model=model, optimizer=model.optimizer)
    assert hvd.load_checkpoint(folder, model=again, optimizer=again.optimizer).step == 3
    found = [half_bits(one) for one in (model, again)]
    for one in (model, again):
        one.train_on_batch(x, y)
    return found, [half_bits(one) for one in (model, again)]


def test_bfloat16_weights_in_a_checkpoint_under_a_compressed_downlink(ranks, tmp_path):
    for found, after in ranks(2, init="tensorflow").run(half_checkpoint, str(tmp_path), timeout=150):
        assert found[0] == found[1]
        assert found[0][0] != found[0][1]  # something was still to be sent
        assert after[0] == after[1] != found[0]

"""State that Keras ties to no variable: Adafactor's factors, Nadam's product; and the loss's scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras
import tensorflow as tf

import hvd_ext.tensorflow.keras as hvd
from hvd_ext.tensorflow.variables import as_tf
from tests.tensorflow import training

pytestmark = pytest.mark.distributed
OPTIMIZERS = {"adafactor": lambda: keras.optimizers.Adafactor(0.01),
              "nadam": lambda: keras.optimizers.Nadam(0.01)}


SERVERS = ("replicated", "rank0", "sharded")


class Scaled(keras.optimizers.SGD):
    """The product of momenta and a number a variable, neither of them made from a reference."""

    separable = True

    def build(self, variables):
        super().build(variables)
        self.rows = [self.add_variable(shape=variable.shape[:1], name="rows") for variable in variables]

    def update_step(self, gradient, variable, learning_rate):
        rows = self.rows[self._get_variable_index(variable)]
        axes = tuple(range(1, len(gradient.shape)))
        self.assign_add(rows, keras.ops.mean(keras.ops.square(gradient), axis=axes))
        super().update_step(gradient, variable, learning_rate * keras.ops.mean(rows))


OPTIMIZERS["own"] = lambda: Scaled(0.1)


def build(kind, server):
    model = training.dense_model()
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS[kind](), server=server)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def train(model, optimizer, steps):
    for step in steps:
        generator = np.random.default_rng(step)
        optimizer.apply([tf.constant(generator.normal(size=tuple(one.shape)), "float32")
                         for one in model.trainable_variables], model.trainable_variables)


def save(kind, server, folder):
    """A checkpoint, on each rank; and a file for all."""
    model, optimizer = build(kind, server)
    train(model, optimizer, range(3))
    hvd.assert_replicas_equal(model, optimizer=optimizer)
    hvd.save_checkpoint(Path(folder) / "run", 3, model=model, optimizer=optimizer)
    model.compile(optimizer, "mse")
    hvd.save_model(model, Path(folder) / "all.keras")
    return training.weights(model)


def go_on(kind, server, folder, way):
    """The weights after three more steps of what was loaded."""
    if way == "checkpoint":
        model, optimizer = build(kind, server)
        hvd.load_checkpoint(Path(folder) / "run", model=model, optimizer=optimizer, reset_per_rank_state=True)
    else:
        model = hvd.load_model(Path(folder) / "all.keras", server=server, custom_optimizers=[Scaled])
        optimizer = model.optimizer
    train(model, optimizer, range(3, 6))
    hvd.assert_replicas_equal(model, optimizer=optimizer)
    return training.weights(model)


def go_on_all(kind, folder):
    return {(server, way): go_on(kind, server, folder, way)
            for server in SERVERS for way in ("checkpoint", "file")}


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_is_loaded_on_fewer_ranks_and_under_other_servers(ranks, tmp_path, kind):
    before = None
    for server in SERVERS:
        for found in ranks(3, init="tensorflow").run(save, kind, server, str(tmp_path / server)):
            before = before or found
            assert same(found, before), server
    after = None
    for server in SERVERS:
        for found in ranks(2, init="tensorflow").run(go_on_all, kind, str(tmp_path / server)):
            after = after or found["replicated", "checkpoint"]
            for way, weights in found.items():
                assert same(weights, after), (server, way)


def accumulate():
    """An optimizer that is built before it is wrapped, in the middle of accumulating."""
    model = training.dense_model()
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    optimizer.build(model.trainable_variables)
    optimizer = hvd.DistributedOptimizer(optimizer)
    gradients = [tf.ones(one.shape) * (1.0 + hvd.rank()) for one in model.trainable_variables]
    optimizer.apply(gradients, model.trainable_variables)
    hvd.assert_replicas_equal(model, optimizer=optimizer)
    hvd.broadcast_variables(optimizer.variables, 0)
    return float(as_tf(optimizer._accumulated_gradients[0])[0, 0])


def test_accumulators_of_a_built_optimizer_are_per_rank(ranks):
    assert ranks(2, init="tensorflow").run(accumulate) == [1.0, 2.0]


def scaled(folder, give):
    """The scale and its counter before saving and after loading, where ``compile`` made them."""
    def compiled():
        keras.utils.set_random_seed(3)
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
            optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
            model.compile(optimizer, "mse")
        finally:
            keras.config.set_dtype_policy("float32")
        return model, optimizer if give == "inner" else model.optimizer

    def state(model):
        return float(model.optimizer.dynamic_scale.numpy()), int(model.optimizer.step_counter.numpy())

    model, optimizer = compiled()
    for k in range(3):
        model.train_on_batch(np.full((4, 5), 1e30 if k == 0 else 1.0, "float32"), np.ones((4, 3), "float32"))
    hvd.save_checkpoint(folder, 1, model=model, optimizer=optimizer)
    saved = state(model)
    model, optimizer = compiled()
    hvd.load_checkpoint(folder, model=model, optimizer=optimizer)
    return saved, state(model)


@pytest.mark.parametrize("give", ["inner", "outer"])
def test_a_checkpoint_holds_the_scale_of_the_loss(ranks, tmp_path, give):
    for saved, loaded in ranks(2, init="tensorflow").run(scaled, str(tmp_path), give):
        assert saved == (2.0 ** 14, 2)
        assert loaded == saved

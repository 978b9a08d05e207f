"""Several optimizers in one process: side by side in one function, and replicas that begin alike."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow as hvd_tf  # noqa: E402
import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.tensorflow import training  # noqa: E402

pytestmark = pytest.mark.distributed
OPTIONS = {
    "plain": dict, "sharded": lambda: {"server": "sharded"},
    "topk": lambda: {"compression": hvd.Compression.topk(1.0, min_size=1)},
    "late": lambda: {"overlap": hvd.DelayedUpdate(0.0, adaptive=False)},
}
WAYS = ("joint", "traced apart", "eager")


def net(seed, shift=0.0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="tanh"),
                              keras.layers.Dense(2)])
    for variable in model.trainable_variables:
        variable.assign_add(tf.ones_like(variable) * shift)
    return model


def batch(rank):
    return tf.constant(np.random.default_rng(rank).standard_normal((4, 3)), tf.float32)


def losses(model, x):
    return tf.reduce_mean((model(x) - 1.0) ** 2)


def train(options, way, steps=3):
    """Weights of two models after steps of two optimizers."""
    pair = [(net(seed), hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), **OPTIONS[options]()))
            for seed in (1, 2)]

    def step(number, x):
        model, optimizer = pair[number]
        with tf.GradientTape() as tape:
            loss = losses(model, x)
        optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_variables),
                                      model.trainable_variables, strict=True))

    x = batch(hvd.rank())
    if way == "eager":
        def both(x):
            step(0, x)
            step(1, x)
    elif way == "joint":
        both = tf.function(lambda x: (step(0, x), step(1, x)))
    else:
        first, second = (tf.function(lambda x, number=number: step(number, x)) for number in range(2))
        first(x)
        second(x)
        steps -= 1
        both = tf.function(lambda x: (first(x), second(x)))
    for _ in range(steps):
        both(x)
    for _, optimizer in pair:
        optimizer.flush()
    return [training.weights(model) for model, _ in pair]


def every_way(options):
    return {way: train(options, way) for way in WAYS}


def one_process(late, steps=3):
    """The models' weights after steps on the joined batch; ``late`` applies each gradient a step later."""
    found = []
    for seed in (1, 2):
        model = net(seed)
        variables, waiting = model.trainable_variables, None
        for _ in range(steps):
            with tf.GradientTape() as tape:
                loss = sum(losses(model, batch(rank)) for rank in range(2)) / 2
            now = tape.gradient(loss, variables)
            for number, variable in enumerate(variables):
                if not late or waiting is not None:
                    variable.assign_sub(0.1 * (waiting if late else now)[number])
            waiting = now
        if late:
            for variable, gradient in zip(variables, waiting, strict=True):
                variable.assign_sub(0.1 * gradient)
        found.append(training.weights(model))
    return found


@pytest.mark.parametrize("options", OPTIONS)
def test_two_optimizers_in_one_function(ranks, options):
    first, second = ranks(2, init="tensorflow").run(every_way, options, timeout=200)
    joined = one_process(late=options == "late")
    for way in WAYS:
        for mine, theirs, expected in zip(first[way], second[way], joined, strict=True):
            for one, other, wanted in zip(mine, theirs, expected, strict=True):
                np.testing.assert_array_equal(one, other)
                np.testing.assert_allclose(one, wanted, rtol=0, atol=1e-6)


class Gan(keras.Model):
    """A generator and a discriminator with an optimizer each, trained in one ``train_step``."""

    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = net(3), keras.Sequential([keras.Input((2,)),
                                                                       keras.layers.Dense(1)])

    def compile(self, generator, discriminator, **options):
        super().compile(**options)
        self.of_generator, self.of_discriminator = generator, discriminator

    def train_step(self, data):
        for part, optimizer, sign in ((self.discriminator, self.of_discriminator, 1.0),
                                      (self.generator, self.of_generator, -1.0)):
            with tf.GradientTape() as tape:
                loss = sign * tf.reduce_mean(self.discriminator(self.generator(data)))
            optimizer.apply_gradients(zip(tape.gradient(loss, part.trainable_variables),
                                          part.trainable_variables, strict=True))
        return {"loss": loss}


def fit_gan(options):
    keras.utils.set_random_seed(4)
    model = Gan()
    model.compile(*(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), **OPTIONS[options]())
                    for _ in range(2)))
    model.fit(batch(hvd.rank()), batch_size=2, epochs=2, shuffle=False, verbose=0)
    assert not np.array_equal(training.weights(model.generator)[0], training.weights(net(3))[0])
    hvd.assert_replicas_equal(model.generator)
    hvd.assert_replicas_equal(model.discriminator)
    return training.weights(model.generator)


@pytest.mark.parametrize("options", ["plain", "topk"])
def test_a_gan_in_model_fit(ranks, options):
    first, second = ranks(2, init="tensorflow").run(fit_gan, options, timeout=200)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def start_apart(way, callback):
    """Weights that are other ones on rank 1; the error of training, or the weights after."""
    model = net(5, shift=1e-3 * hvd.rank())
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    model.compile(optimizer, "mse", run_eagerly=way == "eager", steps_per_execution=2 if way == "many" else 1)
    given = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)] if callback else []
    x = batch(hvd.rank())
    try:
        model.fit(x, tf.ones((4, 2)), batch_size=1, shuffle=False, verbose=0, callbacks=given)
    except Exception as error:
        return str(error)
    return training.weights(model)


def start_all_ways():
    return {(way, callback): start_apart(way, callback) for way in ("fit", "many", "eager")
            for callback in (False, True)}


def test_replicas_that_begin_with_different_weights(ranks):
    first, second = ranks(2, init="tensorflow").run(start_all_ways, timeout=200)
    for (way, callback), mine in first.items():
        theirs = second[way, callback]
        if callback:
            assert not isinstance(mine, str), mine
            assert not np.array_equal(mine[0], training.weights(net(5))[0])
            assert all(np.array_equal(one, other) for one, other in zip(mine, theirs, strict=True))
        else:
            for said in (mine, theirs):
                assert "the replicas begin with different weights" in said, way
                assert "hvd.callbacks.BroadcastGlobalVariablesCallback(0)" in said


def disagree_twice():
    """Two optimizers in one function, both with another ratio on rank 1: the error."""
    pair = [(net(seed), hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.1), compression=hvd.Compression.topk(0.5 + 0.1 * hvd.rank(), min_size=1)))
        for seed in (1, 2)]

    steps = [make_step(*one) for one in pair]
    both = tf.function(lambda x: [step(x) for step in steps])
    with pytest.raises(Exception) as caught:  # noqa: PT011
        both(batch(hvd.rank()))
    return str(caught.value)


def test_two_optimizers_that_disagree_are_an_error_on_all_ranks(ranks):
    for said in ranks(2, init="tensorflow").run(disagree_twice):
        assert "the ranks do not train the same variables in the same way" in said
        assert "ratio" in said


def train_in_threads(options):
    """Weights of two models that a thread each trains, and of the same one after the other."""
    found = []
    for threads in (True, False):
        pair = [(net(seed), hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), **OPTIONS[options]()))
                for seed in (1, 2)]
        for model, optimizer in pair:  # models that are alike are told apart by the order of this
            optimizer.build(model.trainable_variables)
        steps = [make_step(*one) for one in pair]

        def train_one(number, steps=steps):
            for _ in range(6):
                steps[number](batch(hvd.rank()))

        if threads:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(train_one, (0, 1) if hvd.rank() == 0 else (1, 0)))
        else:
            train_one(0)
            train_one(1)
        found.append([training.weights(model) for model, _ in pair])
    return found


def make_step(model, optimizer):
    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = losses(model, x)
        optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_variables),
                                      model.trainable_variables, strict=True))

    return step


def train_in_threads_each_way():
    return [train_in_threads(options) for options in ("plain", "topk")]


def test_two_threads_that_train(ranks):
    by_rank = ranks(2, init="tensorflow").run(train_in_threads_each_way, timeout=200)
    for found in by_rank:
        for (threads, alone), (first, _) in zip(found, by_rank[0], strict=True):
            for mine, expected, other in zip(threads, alone, first, strict=True):
                for one, wanted, same in zip(mine, expected, other, strict=True):
                    np.testing.assert_array_equal(one, wanted)
                    np.testing.assert_array_equal(one, same)


def objects():
    shared = hvd_tf.broadcast_object({"a": 1} if hvd.rank() == 0 else None, 0)
    return shared, hvd_tf.allgather_object("text" if hvd.rank() == 0 else 3)


def test_objects_of_different_types(ranks):
    assert ranks(2, init="tensorflow").run(objects) == [({"a": 1}, ["text", 3])] * 2

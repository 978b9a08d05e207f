"""``hvd.SENG`` under Keras: what it finds out about a model before it trusts its own curvature."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.reference import seng as reference  # noqa: E402
from tests.tensorflow.seng_cases import (  # noqa: E402
    EXACT,
    IMPLICIT,
    LAM,
    MODELS,
    L,
    batch,
    flat,
    gradient,
    per_sample,
    sequential,
)


class Past(keras.Model):
    """A model that uses a weight past its layer's call, and one that it does not."""

    def __init__(self):
        super().__init__()
        self.used, self.out = L.Dense(4, use_bias=False), L.Dense(2)

    def call(self, x):
        return self.out(keras.ops.tanh(self.used(x)) + keras.ops.matmul(x, self.used.kernel))


@pytest.mark.parametrize("settings", [EXACT, IMPLICIT], ids=["explicit", "implicit"])
def test_layer_whose_samples_do_not_sum_to_its_gradient_is_left_out(settings):
    model = Past()
    x, y = batch((5,))
    model(x)
    seng = hvd.SENG(model, update_freq=1, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            found = gradient(model, x, y)
            p = seng.step(found)
    said = [str(one.message) for one in caught if "some layers no curvature" in str(one.message)]
    assert len(said) == 1
    assert "dense" in said[0]
    np.testing.assert_allclose(p[0], found[0] / (1 + LAM), rtol=1e-6)
    us = np.concatenate([part.reshape(len(x), -1) for part in per_sample(model, x, y)[1:]], axis=1)
    expected = reference.direction(reference.dense_u(us), flat(found[1:]), LAM)
    np.testing.assert_allclose(flat(p[1:]), expected, rtol=2e-4, atol=1e-5)
    report = seng.report()
    assert [row["held"] == "identity" for row in report["layers"]] == [True, False]
    assert "used outside of the layer's call" in report["layers"][0]["refused"]
    assert report["layers"][1]["refused"] is None
    assert str(report).startswith("SENG has a rule for 33.3 % of 30 parameters; the rest gets "
                                  "g/(1 + damping): 66.7 % a weight is used outside of the layer's call")


@pytest.mark.parametrize("added", [True, False], ids=["in the loss", "not in the loss"])
def test_regularizers_are_no_difference(added):
    model = sequential((5,), L.Dense(4, kernel_regularizer=keras.regularizers.L2(0.5)))
    seng = hvd.SENG(model, **EXACT)
    x, y = batch((5,))
    with tf.GradientTape() as tape:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, model(x, training=True))
        loss += tf.add_n(model.losses) if added else 0.0
    seng.step(tape.gradient(loss, model.trainable_variables))
    assert not any(bool(state.wrong) for state in seng.states)


class Unbuilt(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner, self.out = L.Dense(4, activation="tanh"), L.Dense(2)

    def call(self, x):
        return self.out(self.inner(x))


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("make", [Unbuilt, lambda: keras.Sequential([L.Dense(4), L.Dense(2)])],
                         ids=["subclassed", "sequential"])
def test_model_that_is_not_built_waits_for_its_first_batch(make, compiled):
    model = make()
    seng = hvd.SENG(model, **EXACT)
    assert seng.states == []
    x, y = batch((5,))

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, model(x, training=True))
        return seng.step(tape.gradient(loss, model.trainable_variables))

    p = (tf.function(step) if compiled else step)(tf.constant(x), tf.constant(y))
    found, samples = gradient(model, x, y), per_sample(model, x, y)
    us = np.concatenate([part.reshape(len(x), -1) for part in samples[:2]], axis=1)
    expected = reference.direction(reference.dense_u(us), flat(found[:2]), LAM)
    np.testing.assert_allclose(flat(p[:2]), expected, rtol=2e-4, atol=1e-5)
    assert seng.report()["failures"] == 0
    seng.close()


def test_equal_layers_share_their_traces():
    made = []
    for depth in (3, 9):
        model = sequential((4, 4, 2), *(L.Conv2D(2, 3, padding="same") for _ in range(depth)))
        seng = hvd.SENG(model, **EXACT)
        seng.step(gradient(model, *batch((4, 4, 2))))
        made.append(len(seng._traces))
    assert made[0] == made[1]


def test_step_of_ones_own_loop():
    model, shape = MODELS["dense"]()
    seng = hvd.SENG(model, **EXACT)
    found = gradient(model, *batch(shape))
    with pytest.raises(ValueError, match="got 1 gradients for 4 variables"):
        seng.step(found[:1])
    assert seng.step([None, *found[1:2], *found[2:]][2:], model.trainable_variables[2:])[0] is not None
    assert int(seng.steps) == 1


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_rows_of_an_embedding_come_as_slices(compiled):
    model, shape = MODELS["embedding"]()
    seng = hvd.SENG(model, **EXACT)
    x, y = batch(shape)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, model(x, training=True))
        found = tape.gradient(loss, model.trainable_variables)
        assert isinstance(found[0], tf.IndexedSlices)
        return seng.step(found)

    p = (tf.function(step) if compiled else step)(tf.constant(x), tf.constant(y))
    found, samples = gradient(model, x, y), per_sample(model, x, y)
    expected = reference.direction(reference.dense_u(samples[0].reshape(len(x), -1)), flat(found[:1]), LAM)
    np.testing.assert_allclose(flat(p[:1]), expected, rtol=2e-4, atol=1e-5)
    assert not any(bool(state.wrong) for state in seng.states)


def test_curvature_of_a_large_embedding_is_that_of_the_rows_used():
    from tests.tensorflow.seng_cases import Tokens

    model = sequential((4,), Tokens(), L.Embedding(50_000, 3))
    seng = hvd.SENG(model, **EXACT)
    x, y = batch((4,))
    seng.step(gradient(model, x, y))
    row = seng.report()["layers"][0]
    assert bool(seng.states[0].ready)
    assert row["formula_bytes"] == 6 * 4 * (3 + 1) * 4  # samples, rows of each, a gradient and its number
    assert row["bytes"] < 2000

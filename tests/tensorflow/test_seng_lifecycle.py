"""``hvd.SENG`` under Keras from step to step on one rank: refreshes, failures, damping, sketches."""

from __future__ import annotations

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
    Alone,
    L,
    batch,
    flat,
    gradient,
    u_of,
)


def test_between_refreshes_nothing_is_captured_and_the_curvature_stays():
    model, shape = MODELS["dense"]()
    seng = hvd.SENG(model, update_freq=3, **EXACT)
    ages, held = [], []
    for number in range(5):
        x, y = batch(shape, seed=number)
        seng.precondition(gradient(model, x, y), model.trainable_variables, Alone())
        ages.append(seng.report()["layers"][0]["age"])
        held.append(np.asarray(seng.states[0].blocks[0].u))
    assert ages == [1, 2, 3, 1, 2]
    np.testing.assert_array_equal(held[0], held[2])
    assert not np.array_equal(held[2], held[3])


def test_bad_gradient_changes_nothing():
    model, shape = MODELS["dense"]()
    seng = hvd.SENG(model, **EXACT)
    x, y = batch(shape)
    found = gradient(model, x, y)
    bad = [g * np.nan if number == 0 else g for number, g in enumerate(found)]
    result = seng.precondition(bad, model.trainable_variables, Alone())
    np.testing.assert_array_equal(result[1], found[1])
    assert int(seng.steps) == 0
    assert not bool(seng.states[0].ready)
    gradient(model, x, y)
    assert bool(seng.capture.wanted)


def test_damping_may_be_a_function_of_the_step():
    model, shape = MODELS["dense"]()
    seng = hvd.SENG(model, damping=lambda step: LAM / (step + 1), sketch=None)
    x, y = batch(shape)
    for lam in (LAM, LAM / 2):
        found = gradient(model, x, y)
        p = seng.precondition(found, model.trainable_variables, Alone())
        u = np.asarray(seng.states[0].blocks[0].u, np.float64).T
        expected = reference.direction(u, flat(found[:2]), lam)
        np.testing.assert_allclose(flat(p[:2]), expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("sketch", ["uniform", "leverage"])
def test_sketched_direction(sketch):
    model, shape = MODELS["conv2d same"]()
    seng = hvd.SENG(model, damping=LAM, sketch=sketch, sketch_size=40)
    x, y = batch(shape)
    found = gradient(model, x, y)
    p = seng.precondition(found, model.trainable_variables, Alone())
    state = seng.states[0]
    omega = np.zeros((40, state.layer.n))
    omega[np.arange(40), np.asarray(state.blocks[0].rows)] = np.asarray(state.blocks[0].weights)
    expected = reference.sketched_direction(np.asarray(state.blocks[0].u, np.float64).T, flat(found[:2]),
                                            LAM, omega)
    np.testing.assert_allclose(flat(p[:2]), expected, rtol=1e-3, atol=1e-4)


def test_samples_that_differ_between_uses_are_no_curvature():
    class Odd(keras.Model):
        def __init__(self):
            super().__init__()
            self.twice, self.out = L.Dense(3), L.Dense(2)

        def call(self, x):
            return self.out(self.twice(x) + keras.ops.mean(self.twice(x[:2]), axis=0))

    model = Odd()
    model(tf.zeros((4, 5)))
    seng = hvd.SENG(model, **EXACT)
    x, y = batch((5,))
    run = tf.function(lambda x, y: seng.precondition(gradient(model, x, y), model.trainable_variables,
                                                     Alone()))
    run(tf.constant(x), tf.constant(y))
    rows = {row["layer"].split("/")[-1]: row for row in seng.report()["layers"]}
    assert [(row["held"], row["failures"]) for row in rows.values()] == [("identity", 1), ("explicit", 0)]
    assert not bool(seng.capture.wanted)


def test_layer_that_no_pass_used_is_counted_and_left():
    model = MODELS["dense"]()[0]
    seng = hvd.SENG(model, **EXACT)
    zeros = [tf.ones(v.shape) for v in model.trainable_variables]
    p = seng.precondition(zeros, model.trainable_variables, Alone())
    np.testing.assert_allclose(p[0], zeros[0] / (1 + LAM), rtol=1e-6)
    assert seng.report()["failures"] == len(seng.states)
    assert bool(seng.capture.wanted)  # nothing was captured anywhere: the next step tries again


def test_weights_of_two_layers_get_the_identity_rule():
    first = L.Dense(4)

    class Tied(L.Dense):
        def build(self, shape):
            self._kernel = first._kernel
            self.bias, self.built = None, True

    model = keras.Sequential([keras.Input((4,)), first, Tied(4, use_bias=False), L.Dense(2)])
    with pytest.warns(UserWarning, match="shares a weight"):
        seng = hvd.SENG(model, **EXACT)
    assert [state.layer.n for state in seng.states] == [10]


def test_reset_state_starts_anew():
    model, shape = MODELS["dense"]()
    seng = hvd.SENG(model, update_freq=4, coupling="lagged", **EXACT)
    first = []
    for _ in range(2):
        for number in range(2):
            x, y = batch(shape, seed=number)
            p = seng.precondition(gradient(model, x, y), model.trainable_variables, Alone())
        first.append(flat(p))
        assert int(seng.steps) == 2
        seng.reset_state()
        assert seng.report()["layers"][0]["held"] == "identity"
    np.testing.assert_array_equal(*first)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_nothing_is_traced_again_from_step_to_step(compiled):
    model, _ = MODELS["conv2d same"]()
    seng = hvd.SENG(model, update_freq=2, **EXACT)
    traced = []

    def step(x, y):
        traced.append(1)
        return seng.precondition(gradient(model, x, y), model.trainable_variables, Alone())

    run = tf.function(step, reduce_retracing=True) if compiled else step
    for number in range(5):
        run(*(tf.constant(part) for part in batch((5, 5, 2), rho=6 if number % 2 else 4, seed=number)))
    assert len(traced) == (2 if compiled else 5)
    assert all(f.experimental_get_tracing_count() == 1 for f in seng._functions.values())


def test_float64_model_is_computed_in_float64():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((5, 5, 2), dtype="float64"),
                              L.Conv2D(3, 3, dtype="float64"), L.Flatten(dtype="float64"),
                              L.Dense(2, dtype="float64")])
    seng = hvd.SENG(model, **EXACT)
    x, y = batch((5, 5, 2))
    found = gradient(model, x.astype("float64"), y)
    p = seng.precondition(found, model.trainable_variables, Alone())
    expected = reference.direction(u_of(seng.states[0]), flat(found[:2]), LAM)
    np.testing.assert_allclose(flat(p[:2]), expected, rtol=1e-9, atol=1e-12)


def test_half_precision_curvature_takes_half_the_bytes():
    sizes = []
    for kind in (None, "bfloat16"):
        for settings in (EXACT, IMPLICIT):
            model, shape = MODELS["conv2d same"]()
            seng = hvd.SENG(model, curvature_dtype=kind, **settings)
            seng.precondition(gradient(model, *batch(shape)), model.trainable_variables, Alone())
            sizes.append(seng.report()["formula_bytes"])
    assert sizes[2] * 2 == sizes[0]
    assert sizes[3] * 2 == sizes[1]


def test_layer_of_ones_own():
    class Scale(keras.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, x):
            return x * self.scale

    model = keras.Sequential([keras.Input((4,)), Scale(), L.Dense(2)])
    with pytest.warns(UserWarning, match=r"no rule for .*\(Scale\)"):
        hvd.SENG(model, **EXACT).close()
    hvd.register_seng_rule(Scale, lambda layer, x, gz, pick: {"scale": pick(x) * pick(gz)},
                           weights=("scale",))
    x, y = batch((4,))
    seng = hvd.SENG(model, **EXACT)
    found = gradient(model, x, y)
    p = seng.precondition(found, model.trainable_variables, Alone())
    us = np.stack([flat(gradient(model, x[i:i + 1], y[i:i + 1])[:1]) for i in range(len(x))])
    expected = reference.direction(reference.dense_u(us), flat(found[:1]), LAM)
    np.testing.assert_allclose(flat(p[:1]), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="has a SENG rule already"):
        hvd.register_seng_rule(L.Dense, lambda *given: {})
    with pytest.raises(TypeError, match=r"subclass of keras.Layer"):
        hvd.register_seng_rule(int, lambda *given: {})

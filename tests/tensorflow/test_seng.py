"""``hvd.SENG`` under Keras on one rank: per-sample gradients, directions, bad input."""

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
    L,
    batch,
    flat,
    gradient,
    per_sample,
    places,
)

CASES = [*((case, EXACT, True) for case in MODELS),
         *((case, EXACT, False) for case in ("dense", "shared", "group norm", "rows")),
         *((case, IMPLICIT, True) for case in MODELS
           if "norm" not in case)]


@pytest.mark.parametrize(("case", "settings", "compiled"), CASES, ids=[
    f"{case}, {'implicit' if settings is IMPLICIT else 'compiled' if compiled else 'eager'}"
    for case, settings, compiled in CASES])
def test_direction_is_the_dense_solve(case, settings, compiled):
    keras.utils.set_random_seed(1)
    model, shape = MODELS[case]()
    x, y = batch(shape)
    if case == "transposed, dilated":
        try:
            model(x)
        except tf.errors.InvalidArgumentError as error:
            if "dilation rates larger than 1" not in str(error):
                raise
            pytest.skip("TensorFlow has no dilated transposed convolution for this CPU (without oneDNN)")
    samples = per_sample(model, x, y)
    seng = hvd.SENG(model, **settings)
    variables = model.trainable_variables

    def step(x, y):
        found = gradient(model, x, y)
        return found, seng.step(found, variables)

    run = tf.function(step) if compiled else step
    g, p = run(tf.constant(x), tf.constant(y))
    assert all(bool(state.ready) for state in seng.states)
    assert not any(bool(state.wrong) for state in seng.states)
    assert seng.report()["coverage"] == 1.0
    for numbers in places(seng, variables):
        us = np.concatenate([samples[k].reshape(len(x), -1) for k in numbers], axis=1)
        expected = reference.direction(reference.dense_u(us), flat([g[k] for k in numbers]), LAM)
        np.testing.assert_allclose(flat([p[k] for k in numbers]), expected, rtol=2e-4, atol=1e-5)
    seng.close()
    assert model.get_config() is not None


@pytest.mark.parametrize("stale", ["keep", "rescale"])
def test_direction_by_curvature_that_is_older_than_the_step(stale):
    keras.utils.set_random_seed(1)
    model, shape = MODELS["dense"]()
    x, y = batch(shape)
    batches = [(x, y), (10 * x[::-1], y)]
    samples = per_sample(model, x, y)
    seng = hvd.SENG(model, **{**EXACT, "update_freq": 5}, stale_curvature=stale)
    variables = model.trainable_variables

    @tf.function(reduce_retracing=True)
    def step(x, y):
        found = gradient(model, x, y)
        return found, seng.step(found, variables)

    solve = {"keep": reference.direction, "rescale": reference.bound_direction}
    for number, (x, y) in enumerate(batches):
        g, p = step(tf.constant(x), tf.constant(y))
        for numbers in places(seng, variables):
            us = np.concatenate([samples[k].reshape(len(x), -1) for k in numbers], axis=1)
            way = solve[stale] if number else reference.direction
            expected = way(reference.dense_u(us), flat([g[k] for k in numbers]), LAM)
            np.testing.assert_allclose(flat([p[k] for k in numbers]), expected, rtol=2e-4, atol=1e-5)
    seng.close()


def test_batch_norm_takes_its_statistics_as_given():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4, 3)), L.BatchNormalization(), L.Flatten(), L.Dense(2)])
    x, y = batch((4, 3))
    seng = hvd.SENG(model, **EXACT)
    g = gradient(model, x, y)
    state = seng.states[0]
    # The mean of the per-sample gradients is the gradient.
    np.testing.assert_allclose(np.asarray(state.captured.u).sum(0) / len(x) ** 0.5, flat(g[:2]),
                               rtol=1e-4, atol=1e-6)


def test_bad_input():
    dense = MODELS["dense"]
    unbuilt = hvd.SENG(keras.Sequential([L.Dense(2)]), damping=1.0)
    with pytest.raises(ValueError, match="no weights yet"):
        unbuilt.step([tf.zeros((2, 2))], [tf.Variable(tf.zeros((2, 2)))])
    frozen = dense()[0]
    frozen.trainable = False
    with pytest.raises(ValueError, match="no trainable layer"):
        hvd.SENG(frozen, damping=1.0)
    with pytest.raises(ValueError, match="damping"):
        hvd.SENG(dense()[0], damping=0.0)
    with pytest.raises(ValueError, match="sketch_size"):
        hvd.SENG(dense()[0], damping=1.0, sketch_size=10**6)
    with pytest.raises(ValueError, match="stale"):
        hvd.SENG(dense()[0], damping=1.0, stale_curvature="old")
    model = dense()[0]
    seng = hvd.SENG(model, damping=1.0)
    with pytest.raises(ValueError, match="tapped already"):
        hvd.SENG(model, damping=1.0)
    seng.close()
    hvd.SENG(model, damping=1.0).close()
    with pytest.raises(TypeError, match="preconditioner must be"):
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), preconditioner="seng")

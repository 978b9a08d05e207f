"""``resample="step"`` in Keras: other rows at every step, the same U (SENG Algorithm 1)."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_ext.tensorflow as hvd
from hvd_ext.seng import sample_rows, seeded_generator
from tests.reference import seng as reference

LAM, Q = 0.3, 40


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((10,)), keras.layers.Dense(12, activation="tanh"),
                             keras.layers.LayerNormalization(), keras.layers.Dense(4)])


def gradients(model, step):
    rng = np.random.default_rng(step)
    x, y = rng.normal(size=(8, 10)).astype("float32"), rng.normal(size=(8, 4)).astype("float32")
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.reduce_sum((model(x) - y) ** 2, axis=1))
    return tape.gradient(loss, model.trainable_variables)


def flat(tensors):
    return np.concatenate([np.ravel(one) for one in tensors]).astype("float64")


@pytest.mark.parametrize("coupling", ["block", "lagged"])
def test_each_step_solves_its_own_sketched_problem(coupling):
    model = network()
    seng = hvd.SENG(model, damping=LAM, update_freq=3, sketch_size=Q, resample="step", coupling=coupling)
    sampled, before, drawn = 0, {}, []
    for step in range(5):
        found = gradients(model, step)
        directions = seng.step(found)
        for state in seng.states:
            places = [k for k, variable in enumerate(model.trainable_variables)
                      if any(variable is weight for weight in state.layer.weights.values())]
            g, p = flat([found[k] for k in places]), flat([directions[k] for k in places])
            (block,) = state.blocks
            u = block.u.numpy().T.astype("float64")
            assert int(state.taken_at) == 3 * (step // 3)
            matrix = np.eye(len(g))
            if len(g) > Q:
                rows, weights = sample_rows(len(g), Q, seeded_generator(0, step, f"{state.layer.key}/rows"))
                matrix = np.zeros((Q, len(g)))
                matrix[np.arange(Q), rows] = weights
                drawn.append(tuple(rows))
                sampled += 1
            former = before.get(state, g) if coupling == "lagged" else g
            ub = former - LAM * reference.sketched_direction(u, former, LAM, matrix)
            before[state] = g
            np.testing.assert_allclose(p, (g - ub) / LAM, rtol=2e-4, atol=2e-5)
    assert sampled == len(set(drawn)) == 10


def test_rows_of_factors_are_drawn_anew():
    model = network()
    seng = hvd.SENG(model, damping=LAM, update_freq=10, explicit_threshold=0, row_sketch=5, rank=4,
                    resample="step")
    rows = []
    for step in range(3):
        seng.step(gradients(model, step))
        rows.append([tuple(block.rows_a.numpy()) for state in seng.states for block in state.blocks
                     if hasattr(block, "rows_a")])
    assert rows[0]
    assert rows[0] != rows[1] != rows[2]
    assert all(int(state.taken_at) == 0 for state in seng.states)

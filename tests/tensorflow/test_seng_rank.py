"""``rank="auto"`` in Keras: the columns that the damping leaves meaningful, as in PyTorch."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_ext.tensorflow as hvd
from hvd_ext.tensorflow.seng import kernels
from tests.reference import seng as reference

RHO = 6


def ranks_and_energies(lam, rank):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((8, 8, 4)), keras.layers.Conv2D(8, 3, padding="same", activation="tanh"),
        keras.layers.Conv2D(6, 3, padding="same", groups=2), keras.layers.Flatten(), keras.layers.Dense(3)])
    rng = np.random.default_rng(0)
    x = tf.image.resize(rng.normal(size=(RHO, 2, 2, 4)).astype("float32"), (8, 8))
    seng = hvd.SENG(model, damping=lam, rank=rank, explicit_threshold=0, sketch=None)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(
            np.arange(RHO) % 3, model(x), from_logits=True))
    seng.step(tape.gradient(loss, model.trainable_variables))
    return [int(state.blocks[0].g.shape[2] or tf.shape(state.blocks[0].g)[2]) for state in seng.states], seng


@pytest.mark.parametrize("lam", [0.01, 1.0])
def test_the_rank_is_the_least_that_keeps_what_matters(lam):
    _, whole = ranks_and_energies(lam, 10**6)
    ranks, seng = ranks_and_energies(lam, "auto")
    for state, rank in zip(whole.states, ranks, strict=True):
        block = state.blocks[0]
        g, a = (np.transpose(one.numpy().astype("float64"), (3, 0, 2, 1)) for one in (block.g, block.a))
        assert rank == reference.fewest_columns(g, a, lam)
    assert [row["rank"] for row in seng.report()["layers"]] == ranks
    assert ranks[0] < 32


def test_meaningful_counts_from_the_end():
    g = tf.tile(tf.linalg.diag([3.0, 2.0, 1.0])[None, None], (2, 1, 1, 1))
    a = tf.tile(tf.eye(3)[None, None], (2, 1, 1, 1))
    for least, kept in ((0.0, 3), (1.9, 3), (2.0, 2), (10.0, 1), (100.0, 1)):
        assert int(kernels.effective_rank(g, a, tf.constant(least, tf.float64))) == kept

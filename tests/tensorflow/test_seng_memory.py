"""``memory=`` in Keras: what is held stays within it, and the step is that of the settings it chose."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_ext.tensorflow as hvd

SAMPLES = 48


def trained(wrong=False, **settings):
    keras.utils.set_random_seed(0)
    last = keras.layers.Dense(5, name="last")
    model = keras.Sequential([
        keras.Input((6, 6, 3)), keras.layers.Conv2D(8, 3, padding="same"),
        keras.layers.GroupNormalization(2), keras.layers.ReLU(), keras.layers.Flatten(),
        keras.layers.Dense(40, activation="tanh"), last])
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(SAMPLES, 6, 6, 3)).astype("float32"), rng.integers(0, 5, SAMPLES)
    seng = hvd.SENG(model, damping=0.3, **settings)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True))
        if wrong:  # a use of the kernel that no call shows
            loss += tf.reduce_sum(last.kernel ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    return seng, seng.step(gradients)


@pytest.mark.parametrize("memory", ["4MB", 500_000, 60_000])
def test_what_is_held_stays_within(memory, capsys):
    seng, directions = trained(memory=memory)
    budget = 4_000_000 if memory == "4MB" else memory
    assert 0.2 * min(budget, 2_000_000) < seng.report()["bytes"] <= budget
    assert capsys.readouterr().out.count(f"memory={memory!r} is kept") == 1
    chosen = {name: getattr(seng.settings, name) for name in ("explicit_threshold", "rank", "subsample")}
    _, expected = trained(**chosen)
    for one, other in zip(directions, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_gradients_are_checked_where_all_samples_are_in():
    seng, _ = trained(wrong=True, memory="4MB")
    assert seng.settings.subsample > SAMPLES
    assert [row["refused"] is not None for row in seng.report()["layers"]] == [False, False, False, True]
    seng, _ = trained(wrong=True, subsample=SAMPLES // 2)
    assert not any(row["refused"] for row in seng.report()["layers"])


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="memory must be at least"):
        trained(memory=100)

"""The SENG paper's learning rates under Keras equal the plain functions, also inside ``model.fit``."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

from hvd_ext.seng import IMAGENET_RECIPES, Cosine, ExpDecay, WarmUp  # noqa: E402
from hvd_ext.tensorflow.seng.schedules import cosine_lr, exp_lr, recipe_lr  # noqa: E402

RECIPE = IMAGENET_RECIPES[512]
CASES = {
    "exp": (exp_lr(0.3, max_epoch=10, decay=4, steps_per_epoch=7),
            lambda epoch: 0.3 * ExpDecay(10, 4)(epoch)),
    "cosine": (cosine_lr(0.2, max_epoch=8, steps_per_epoch=7, warmup_epochs=2, warmup_start=0.1),
               lambda epoch: 0.2 * WarmUp(Cosine(8, 0.2), 2, 0.1)(epoch)),
    "recipe": (recipe_lr(RECIPE, steps_per_epoch=7), lambda epoch: RECIPE.lr * RECIPE.lr_factor()(epoch)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_function_of_the_epoch(case):
    schedule, expected = CASES[case]
    again = type(schedule).from_config(schedule.get_config())
    traced = tf.function(schedule)
    for step in (0, 3, 13, 14, 30, 55, 69, 70, 100, 430):
        for one in (schedule, again, traced):
            np.testing.assert_allclose(float(one(tf.constant(step))), expected(step / 7), rtol=2e-5,
                                       atol=1e-9)


def test_inside_fit(tmp_path):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[-1].set_weights([np.zeros((1, 1))])
    schedule = exp_lr(0.5, max_epoch=2, decay=1, steps_per_epoch=2)
    # A loss of -w x: the gradient is -1 at every step.
    model.compile(keras.optimizers.SGD(schedule), loss=lambda y, out: -out, jit_compile=False)
    model.fit(np.ones((3, 1)), np.ones((3, 1)), batch_size=1, epochs=1, verbose=0, shuffle=False)
    expected = 0.5 * (1.0 + 0.75 + 0.5)
    np.testing.assert_allclose(model.layers[-1].get_weights()[0][0, 0], expected, rtol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert loaded.built
    config = keras.optimizers.serialize(model.optimizer)
    assert keras.optimizers.deserialize(config).get_config() == model.optimizer.get_config()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"max_epoch": 0}, "max_epoch"), ({"steps_per_epoch": 0}, "steps_per_epoch"),
    ({"warmup_epochs": -1}, "warmup_epochs"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        exp_lr(0.1, **{"max_epoch": 5, "steps_per_epoch": 3, **arguments})

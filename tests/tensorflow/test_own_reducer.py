"""``hvd.register_reducer``: a way to reduce that comes from outside the package."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.tensorflow.sign_reducer import Sign, SignReducer  # noqa: E402

SHAPES = [(9, 5), (7,), ()]


def made_gradients(rank, step):
    rng = np.random.default_rng([rank, step])
    return [rng.standard_normal(shape).astype("float32") for shape in SHAPES]


def steps_with_signs(scales):
    hvd.init()
    if not hasattr(hvd.Compression, "sign"):
        hvd.register_reducer(Sign, SignReducer)
    variables = [tf.Variable(tf.zeros(shape)) for shape in SHAPES]
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.5), compression=hvd.Compression.sign(scales[hvd.rank()]))
    try:
        for step in range(3):
            optimizer.apply(made_gradients(hvd.rank(), step), variables)
    except Exception as error:
        return str(error)
    return [variable.numpy() for variable in variables]


def sum_of_means(number, ranks=2, steps=3, scale=0.25):
    """Error feedback by hand: the sum over steps of the mean over ranks of ``scale * sign(g + e)``."""
    residual, moved = [0.0] * ranks, 0.0
    for step in range(steps):
        for rank in range(ranks):
            total = made_gradients(rank, step)[number].astype(np.float64) + residual[rank]
            sent = scale * np.sign(total)
            residual[rank] = total - sent
            moved = moved + sent / ranks
    return moved


@pytest.mark.distributed
def test_a_reducer_of_ones_own(ranks):
    results = ranks(2, init="tensorflow").run(steps_with_signs, [0.25, 0.25])
    for number in range(len(SHAPES)):
        np.testing.assert_allclose(results[0][number], -0.5 * sum_of_means(number), atol=1e-6)
        np.testing.assert_array_equal(results[0][number], results[1][number])


@pytest.mark.distributed
def test_its_settings_are_compared_between_ranks(ranks):
    messages = ranks(2, init="tensorflow").run(steps_with_signs, [0.25, 0.5])
    assert all("do not train the same variables in the same way" in message for message in messages)

"""``hvd.SENG`` under Keras on real ranks: couplings, ``model.fit`` and tapes, save and continue."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.reference import seng as reference  # noqa: E402
from tests.tensorflow import seng_on_ranks as on_ranks  # noqa: E402
from tests.tensorflow import training  # noqa: E402
from tests.tensorflow.seng_cases import EXACT, LAM, Alone  # noqa: E402

pytestmark = pytest.mark.distributed

FOUR = pytest.param(4, marks=pytest.mark.extended)
BOTH = {**EXACT, "explicit_threshold": 100, "rank": 10**6, "uc": "exact"}


@pytest.mark.parametrize("size", [2, FOUR])
@pytest.mark.parametrize("coupling", ["block", "lagged", "full"])
def test_couplings_are_their_equations(ranks, size, coupling):
    everyone = ranks(size, init="tensorflow").run(
        on_ranks.trained, {**BOTH, "coupling": coupling}, 4, 3, timeout=150)
    before = {}
    for step, together in enumerate(zip(*everyone, strict=True)):
        for layer in range(len(together[0]["u"])):
            us = [rank["u"][layer] for rank in together]
            g = together[0]["g"][layer]
            if coupling == "full":
                expected = reference.joint_direction(us, g, LAM)
            else:
                lagged = before.get(layer) if coupling == "lagged" else None
                expected = reference.block_direction(us, g, LAM, lagged)
            before[layer] = g
            for rank in together:
                np.testing.assert_array_equal(rank["p"][layer], together[0]["p"][layer])
                np.testing.assert_allclose(rank["p"][layer], expected, rtol=3e-4, atol=2e-5,
                                           err_msg=f"step {step}, layer {layer}")


def test_replicas_agree_where_ranks_need_other_numbers_of_columns(ranks):
    settings = {**BOTH, "rank": "auto", "coupling": "block"}
    everyone = ranks(2, init="tensorflow").run(on_ranks.trained, settings, 3, 3, timeout=150)
    for first, second in zip(*everyone, strict=True):
        for layer, (one, other) in enumerate(zip(first["p"], second["p"], strict=True)):
            np.testing.assert_array_equal(one, other)
            us = [rank["u"][layer] for rank in (first, second)]
            np.testing.assert_allclose(one, reference.block_direction(us, first["g"][layer], LAM),
                                       rtol=3e-4, atol=2e-5)


JOINED = {
    "implicit, factored": {"sketch": None, "explicit_threshold": 0, "rank": 4},
    "implicit, sketched rows": {"row_sketch": 7, "explicit_threshold": 0, "rank": 4, "uc": "exact"},
    "explicit, leverage": {"sketch": "leverage", "sketch_size": 60},
    "explicit, redrawn": {"sketch_size": 60, "resample": "step"},
    "implicit, redrawn": {"row_sketch": 7, "explicit_threshold": 0, "rank": 4, "resample": "step"},
    "leverage, redrawn": {"sketch": "leverage", "sketch_size": 60, "resample": "step"},
}


@pytest.mark.parametrize("size", [2, FOUR])
def test_full_equals_one_process_on_the_joined_batch(ranks, size):
    on_four = ("implicit, sketched rows", "implicit, redrawn")
    names = [name for name in JOINED if (name in on_four) == (size == 4)]
    cases = [{"damping": LAM, **JOINED[name]} for name in names]
    everyone = ranks(size, init="tensorflow").run(on_ranks.joined, cases, 3, timeout=300)

    def batch_of(number, rho):
        parts = [on_ranks.rank_batch(rank, number, rho) for rank in range(size)]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    for number, (name, settings) in enumerate(zip(names, cases, strict=True)):
        model = on_ranks.network()
        seng = hvd.SENG(model, update_freq=2, **settings)
        alone = on_ranks.directions(model, seng, Alone(), 2, 3, batch_of)
        for step, wanted in enumerate(alone):
            for layer, direction in enumerate(wanted["p"]):
                found = everyone[0][number][step][layer]
                error = np.linalg.norm(found - direction) / np.linalg.norm(direction)
                assert error <= 1e-5, (name, step, layer, error)


@pytest.mark.parametrize("size", [2])
def test_fit_equals_one_process_however_the_loss_is_scaled(ranks, size):
    pool = ranks(size, init="tensorflow")
    model = training.dense_model()
    seng = hvd.SENG(model, damping=0.5, update_freq=2, sketch=None)

    class Preconditioned(keras.optimizers.SGD):
        def _clip_gradients(self, grads):
            return seng.precondition(grads, model.trainable_variables, Alone())

    training.fit_joined(model, Preconditioned(0.1, momentum=0.9), size)
    for how, wrap in (({}, "plain"), ({"run_eagerly": True}, "plain"), ({}, "factor"),
                      ({}, "outside"), ({"run_eagerly": True}, "inside")):
        everyone = pool.run(on_ranks.fitted, how, wrap, timeout=150)
        for weights, steps, failures in everyone:
            assert (steps, failures) == (12, 0)
            for mine, first, one in zip(weights, everyone[0][0], training.weights(model),
                                        strict=True):
                np.testing.assert_array_equal(mine, first)
                np.testing.assert_allclose(mine, one, rtol=1e-4, atol=1e-5, err_msg=f"{how} {wrap}")


def test_fit_redraws_joined_sketches(ranks):
    model = training.dense_model()
    seng = hvd.SENG(model, **on_ranks.REDRAWN)

    class Preconditioned(keras.optimizers.SGD):
        def _clip_gradients(self, grads):
            return seng.precondition(grads, model.trainable_variables, Alone())

    training.fit_joined(model, Preconditioned(0.1, momentum=0.9), 2)
    for weights in ranks(2, init="tensorflow").run(on_ranks.fitted_redrawn, timeout=150):
        for mine, one in zip(weights, training.weights(model), strict=True):
            np.testing.assert_allclose(mine, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["explicit, redrawn", "implicit, redrawn"])
def test_no_rank_waits_for_sketches_of_a_layer_without_curvature(ranks, name):
    settings = {"damping": LAM, **JOINED[name]}
    for error, finite in ranks(2, init="tensorflow").run(on_ranks.redrawn_without_curvature, settings):
        assert error < 1e-6
        assert finite


@pytest.mark.parametrize("size", [2])
def test_mixed_float16_trains_through_an_overflow(ranks, size):
    pool = ranks(size, init="tensorflow")
    plain = pool.run(on_ranks.fitted, {}, "plain", "float32", "lagged", timeout=150)[0]
    half = pool.run(on_ranks.fitted, {}, "outside", "mixed_float16", "lagged", timeout=150)[0]
    assert half[1:] == (12, 0)
    start = training.weights(training.dense_model())
    for one, other, first in zip(plain[0], half[0], start, strict=True):
        np.testing.assert_allclose(other, one, atol=0.02)
        assert np.abs(one - first).max() > 0.04  # not for want of training
    weights, steps, failures = pool.run(on_ranks.fitted, {}, "overflow", "mixed_float16",
                                        timeout=150)[0]
    assert 0 < steps < 12
    assert failures == 0
    assert all(np.isfinite(weight).all() for weight in weights)


@pytest.mark.parametrize("size", [2])
def test_accumulated_passes_are_one_step(ranks, size):
    pool = ranks(size, init="tensorflow")
    model = training.dense_model()
    seng = hvd.SENG(model, damping=0.5, update_freq=2, sketch=None)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    x, y = training.data()
    rows = size * training.BATCH
    for number in range(12):
        part = slice(number % 6 * rows, (number % 6 + 1) * rows)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x[part], training=True) - y[part]) ** 2)
        found = tape.gradient(loss, model.trainable_variables)
        if number % 2 == 0:
            before = found
            seng.end_pass()
            continue
        mean = [(one + other) / 2 for one, other in zip(before, found, strict=True)]
        turned = seng.precondition(mean, model.trainable_variables, Alone())
        optimizer.apply_gradients(list(zip(turned, model.trainable_variables, strict=True)))
    for how, wrap in (({}, "accumulation"), ({}, "passes"), ({"run_eagerly": True}, "passes")):
        weights, steps, failures = pool.run(on_ranks.fitted, how, wrap, timeout=150)[0]
        assert (steps, failures) == (6, 0)
        for mine, one in zip(weights, training.weights(model), strict=True):
            np.testing.assert_allclose(mine, one, rtol=1e-4, atol=1e-5, err_msg=wrap)


@pytest.mark.parametrize("size", [2])
def test_tape_is_told_what_scales_the_loss(ranks, size):
    pool = ranks(size, init="tensorflow")
    plain = pool.run(on_ranks.taped, True, None)[0]
    for compiled in (True, False):
        for one, other in zip(plain, pool.run(on_ranks.taped, compiled, 1024.0)[0], strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [2])
@pytest.mark.parametrize("coupling", ["lagged", "full"])
def test_resumed_run_is_the_same_bit_for_bit(ranks, size, coupling, tmp_path):
    everyone = ranks(size, init="tensorflow").run(on_ranks.resumed, coupling, str(tmp_path), timeout=150)
    for same, error in everyone:
        assert same
        assert "is that of rank 1 of 2: save and restore one file per rank" in error


@pytest.mark.parametrize("size", [2])
def test_ranks_that_disagree(ranks, size):
    pool = ranks(size, init="tensorflow")
    for ages, finite in pool.run(on_ranks.bad_on_one_rank):
        assert ages == [[1, 1], [2, 1], [1, 1]]
        assert finite
    for identity, said, failures in pool.run(on_ranks.check_fails_on_one_rank, timeout=120):
        assert identity == [True, False]
        assert len(said) == 1
        assert failures == [2, 0]
    for error in pool.run(on_ranks.other_settings_on_one_rank):
        assert "rank 1 does not have seed=0; has seed=1" in error
    for error in pool.run(on_ranks.other_damping_on_one_rank):
        assert "does not have damping=0.3 at step 0; has damping=0.6 at step 0" in error
    for uc in ("factored", "exact"):
        assert pool.run(on_ranks.other_image_sizes, uc) == [True, True]

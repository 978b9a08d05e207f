"""``hvd.SENG`` under Keras: where layers have their samples, and what weights without curvature get."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from hvd_ext.tensorflow.seng.refresh import check_ranks  # noqa: E402
from tests.reference import seng as reference  # noqa: E402
from tests.tensorflow.seng_cases import (  # noqa: E402
    EXACT,
    IMPLICIT,
    LAM,
    MODELS,
    Alone,
    L,
    batch,
    contiguous,
    flat,
    gradient,
    per_sample,
    places,
    sequential,
)
from tests.tolerances import rounding_tolerance  # noqa: E402

ops = keras.ops


def check_directions(model, x, y, seng, p, leave=(), samples=None):
    """Each layer's direction is the dense solve with the gradients of single samples."""
    found, variables = gradient(model, x, y), model.trainable_variables
    samples = per_sample(model, x, y) if samples is None else samples
    checked = 0
    for state, numbers in zip(seng.states, places(seng, variables), strict=True):
        if state.layer.layer.name in leave:
            continue
        us = np.concatenate([samples[k].reshape(len(samples[k]), -1) for k in numbers], axis=1)
        expected = reference.direction(reference.dense_u(us), flat([found[k] for k in numbers]), LAM)
        np.testing.assert_allclose(flat([p[k] for k in numbers]), expected, rtol=2e-4, atol=1e-5)
        checked += 1
    assert checked


@pytest.mark.parametrize(("case", "where"), [
    ("dense of sequences", "axis 0"), ("rows", "contiguous"), ("strided rows", "strided"),
    ("time-major", "axis 1")])
def test_samples_are_found(case, where):
    seng = hvd.SENG(MODELS[case]()[0], **EXACT)
    *rows, last = (row["samples"] for row in seng.report()["layers"])
    assert rows == [where] * len(rows)
    assert last == "axis 0"


def rolled():
    return contiguous(L.Lambda(lambda x: ops.roll(x, 1, axis=0)), L.Dense(4, name="one"),
                      L.Dense(4, name="two"), L.Lambda(lambda x: ops.roll(x, -1, axis=0)))


def test_rows_that_belong_to_no_sample_are_said_once_or_refused_or_agreed():
    with pytest.warns(UserWarning, match=r"each row counts as a sample .*strict=True refuses") as caught:
        seng = hvd.SENG(rolled(), **EXACT)
    assert len(caught) == 1
    assert [row["samples"] for row in seng.report()["layers"]] == ["rows", "rows", "axis 0"]
    model = rolled()
    with pytest.raises(ValueError, match=r"rows of .*one, .*two belong .* strict=False"):
        hvd.SENG(model, strict=True, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agreed = hvd.SENG(model, strict=True, **EXACT,
                          samples={"one": "rows", model.get_layer("two").path: "rows"})
    assert [row["samples"] for row in agreed.report()["layers"]] == ["rows", "rows", "axis 0"]


class Flattened(keras.Model):
    """A subclassed model that joins batch and time, behind a convolution that does not."""

    def __init__(self):
        super().__init__()
        self.conv, self.inner, self.out = L.Conv1D(5, 2, padding="same"), L.Dense(4), L.Dense(2)

    def call(self, x, training=False):
        z = ops.reshape(self.conv(x), (-1, 5))
        return self.out(ops.reshape(ops.tanh(self.inner(z)), (-1, 12)))


@pytest.mark.parametrize("how", ["compiled", "eager", "compiled, not built", "eager, not built"])
def test_samples_of_a_subclassed_model_are_found_at_its_first_batch(how):
    keras.utils.set_random_seed(1)
    model, (x, y) = Flattened(), batch((3, 4))
    if "not built" not in how:
        model(x)
    seng = hvd.SENG(model, **EXACT)

    def step(x, y):
        return seng.step(gradient(model, x, y), model.trainable_variables)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = (tf.function(step) if "compiled" in how else step)(tf.constant(x), tf.constant(y))
    assert [row["samples"] for row in seng.report()["layers"]] == ["axis 0", "contiguous", "axis 0"]
    check_directions(model, x, y, seng, p)


@pytest.mark.parametrize("settings", [EXACT, IMPLICIT], ids=["explicit", "implicit"])
def test_a_model_whose_own_input_has_time_first(settings):
    keras.utils.set_random_seed(1)
    given = keras.Input(batch_shape=(3, None, 5))
    turned = L.Lambda(lambda x: ops.transpose(x, (1, 0, 2)))(L.Dense(4, activation="tanh")(given))
    model = keras.Model(given, L.Dense(2)(L.Flatten()(turned)))
    x, y = batch((3, 5))
    x = np.ascontiguousarray(x.swapaxes(0, 1))
    seng = hvd.SENG(model, samples=1, **settings)
    p = seng.step(gradient(model, x, y))
    assert [row["samples"] for row in seng.report()["layers"]] == ["axis 1", "axis 0"]
    rows = [gradient(model, x[:, i:i + 1], y[i:i + 1]) for i in range(6)]
    check_directions(model, x, y, seng, p, samples=[np.stack(one) for one in zip(*rows, strict=True)])


ORDER = np.random.default_rng(3).permutation(18)  # of the rows of 6 samples of 3


def mixed_up():
    return contiguous(L.Lambda(lambda x: ops.take(x, ORDER, axis=0) if x.shape[0] in (18, None) else x),
                      L.Dense(4, activation="tanh", name="inner"),
                      L.Lambda(lambda x: ops.take(x, np.argsort(ORDER), axis=0)
                               if x.shape[0] in (18, None) else x))


@pytest.mark.parametrize("settings", [EXACT, IMPLICIT, {**EXACT, "subsample": 4}],
                         ids=["explicit", "implicit", "subsample"])
def test_a_function_says_which_sample_each_row_is_of(settings):
    keras.utils.set_random_seed(1)
    model, (x, y) = mixed_up(), batch((3, 5))
    asked = []

    def sample_of(rows):
        asked.append(rows)
        return ORDER // 3

    seng = hvd.SENG(model, samples={"inner": sample_of}, **settings)
    p = seng.step(gradient(model, x, y))
    assert asked == [18]
    assert {(row["samples"], row["rho"]) for row in seng.report()["layers"]} == {
        ("function", settings.get("subsample", 6)), ("axis 0", settings.get("subsample", 6))}
    if "subsample" not in settings:
        check_directions(model, x, y, seng, p)


def test_samples_of_different_numbers_of_rows():
    from hvd_ext.tensorflow.seng.rules import Factors
    from hvd_ext.tensorflow.seng.sample_axes import group_rows, regroup_result
    rng = np.random.default_rng(0)
    sample = np.array([1, 0, 1, 2, 1, 0])
    g, a = rng.standard_normal((6, 1, 2, 3)), rng.standard_normal((6, 1, 2, 4))
    group = group_rows(lambda rows: sample, tf.constant(6), None)
    found = regroup_result(Factors(tf.constant(g), tf.constant(a), {"bias": tf.constant(g[:, 0, 0])}), group,
                           tf.identity)
    assert found.g.shape == (3, 1, 6, 3)
    for k in range(3):
        mine = sample == k
        np.testing.assert_allclose(np.asarray(found.a)[k, 0].T @ np.asarray(found.g)[k, 0],
                                   np.einsum("rka,rkg->ag", a[mine, 0], g[mine, 0]))
        np.testing.assert_allclose(np.asarray(found.rest["bias"])[k], g[mine, 0, 0].sum(0))


def test_names_in_samples_must_be_there():
    with pytest.raises(ValueError, match=r"samples names the layer 'body', which .* does not have"):
        hvd.SENG(MODELS["rows"]()[0], samples={"body": 0}, **EXACT)


def test_the_smallest_part_that_samples_names_holds():
    inner = keras.Sequential([keras.Input((5,)), L.Dense(4, name="one"), L.Dense(4, name="two")], name="part")
    model = contiguous(inner)
    seng = hvd.SENG(model, samples={"part": "contiguous", "two": "rows"}, strict=True, **EXACT)
    found = {row["layer"].split("/")[-1]: row["samples"] for row in seng.report()["layers"]}
    assert (found["one"], found["two"]) == ("contiguous", "rows")


class Positions(keras.Layer):
    """A table of positions, looked up the same for all samples."""

    def __init__(self):
        super().__init__()
        self.table = L.Embedding(4, 5, name="table")

    def build(self, shape):
        self.table.build(shape)

    def call(self, x):
        return x + self.table(ops.arange(4))


def test_a_layer_that_sees_no_samples_has_none():
    model, (x, y) = sequential((4, 5), Positions(), L.Dense(3, activation="tanh")), batch((4, 5))
    seng = hvd.SENG(model, fallback="matched", **EXACT)
    with pytest.warns(UserWarning, match="table: its input is the same for all samples") as caught:
        p = seng.step(gradient(model, x, y))
    assert len(caught) == 1
    assert [row["samples"] for row in seng.report()["layers"]] == ["constant", "axis 0", "axis 0"]
    np.testing.assert_allclose(p[0], gradient(model, x, y)[0] / LAM, rtol=1e-6)
    check_directions(model, x, y, seng, p, leave=["table"])


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize(("other", "divisor"), [("identity", 1 + LAM), ("matched", LAM), ("none", 1.0)])
@pytest.mark.usefixtures("float64")
def test_what_weights_without_curvature_get(other, divisor, compiled):
    model, shape = MODELS["dense"]()
    path = model.layers[0].path
    seng = hvd.SENG(model, fallback=other, exclude=[path], **EXACT)
    x, y = batch(shape)

    def step(x, y):
        return seng.step(gradient(model, x, y))

    p = (tf.function(step) if compiled else step)(tf.constant(x), tf.constant(y))
    for direction, g in zip(p[:2], gradient(model, x, y)[:2], strict=True):
        # A forward and a backward pass through products of 5, 4 and 6 terms, tanh and a softmax.
        np.testing.assert_allclose(direction, g / divisor, rtol=0,
                                   atol=rounding_tolerance("float64", 50, magnitude=10))
    check_directions(model, x, y, seng, p)
    report = seng.report()
    assert report["rate_ratio"] == divisor / LAM
    assert report["without_rule"] == {"in exclude=": {"parameters": 24, "modules": [f"{path}, Dense"]}}


class Watched(keras.Model):
    """Batch statistics, dropout, a loss of its own, and samples whose place must be looked for."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = L.BatchNormalization(), L.Dropout(0.5, seed=3)
        self.inner, self.out = L.Dense(4), L.Dense(2)

    def call(self, x, training=False):
        z = self.inner(ops.reshape(self.norm(x), (-1, 5)))
        self.add_loss(ops.mean(z))
        return self.out(self.drop(ops.reshape(z, (-1, 12))))


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_the_passes_leave_no_trace(compiled):
    found = []
    x, y = batch((3, 5))
    for with_seng in (True, False):
        keras.utils.set_random_seed(1)
        model = Watched()
        model(x)
        seng = hvd.SENG(model, **EXACT) if with_seng else None

        def step(x, y, model=model):
            with tf.GradientTape() as tape:
                loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(
                    y, model(x, training=True)) + tf.add_n(model.losses)
            assert len(model.losses) == 1
            return loss, *tape.gradient(loss, model.trainable_variables)

        one = (tf.function(step) if compiled else step)(tf.constant(x), tf.constant(y))
        found.append([*map(np.asarray, one), *map(np.asarray, model.variables)])
        if seng is not None:
            assert "contiguous" in {row["samples"] for row in seng.report()["layers"]}
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


class Training(Flattened):
    def call(self, x, training=False):
        if not training:
            raise NotImplementedError("never evaluated")
        return super().call(x)


def test_passes_that_fail_are_said():
    model, (x, y) = Training(), batch((3, 4))
    for strict in (False, True):
        seng = hvd.SENG(model, strict=strict, **EXACT)
        found = gradient(model, x, y)
        if strict:
            with pytest.raises(ValueError, match=r"rows of .*dense.* belong"):
                seng.step(found)
        else:
            with pytest.warns(UserWarning, match=r"belong .*NotImplementedError: .*never evaluated"):
                seng.step(found)
            # The shapes of what the convolution and the last layer see leave no doubt.
            assert [row["samples"] for row in seng.report()["layers"]] == ["axis 0", "rows", "axis 0"]
        seng.close()


class OtherCannotTell(Alone):
    """A rank beside another one, which cannot tell the samples of a layer apart."""

    size = 2

    def allgather_object(self, mine, name):
        return [mine, (*mine[:-1], ["far/dense"])]


@pytest.mark.parametrize("strict", [False, True])
def test_what_another_rank_cannot_tell_is_said_or_refused_here_too(strict):
    seng = hvd.SENG(MODELS["dense"]()[0], strict=strict, **EXACT)
    given = {"prefix": "seng", "stamp": (-1, -1), "step": 0, "due": True, "by_rows": []}
    if strict:
        with pytest.raises(ValueError, match="rows of far/dense belong"):
            check_ranks(seng.states, seng.settings, OtherCannotTell(), **given)
    else:
        assert check_ranks(seng.states, seng.settings, OtherCannotTell(), **given) == ["far/dense"]

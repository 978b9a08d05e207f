"""SyncBatchNormalization: equal to one process on the joined batch, in float64."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.tensorflow import training  # noqa: E402

EPS = 1e-3
CASES = {  # shape of all rows together, rows of each of two ranks
    "even": ((8, 5), (4, 4)),
    "uneven": ((9, 5), (7, 2)),
    "images": ((5, 4, 3, 2), (3, 2)),
    "one rank without rows": ((4, 3), (4, 0)),
    "far from zero": ((8, 2), (3, 5)),
}


def rows_of(name):
    shape, _ = CASES[name]
    rng = np.random.default_rng(len(name))
    x = rng.normal(size=shape) * 2 + (1e6 if name == "far from zero" else 1)
    return x, rng.normal(size=shape)


def oracle(x, upstream, gamma, beta):
    """Output and gradients of sum(upstream * y), by NumPy; Ioffe and Szegedy 2015, section 3."""
    axes = tuple(range(x.ndim - 1))
    n = x.size // x.shape[-1]
    mean = x.mean(axes)
    variance = ((x - mean) ** 2).mean(axes)
    scale = 1.0 / np.sqrt(variance + EPS)
    hat = (x - mean) * scale
    d_hat = upstream * gamma
    dx = scale / n * (n * d_hat - d_hat.sum(axes) - hat * (d_hat * hat).sum(axes))
    return (hat * gamma + beta, dx, (upstream * hat).sum(axes), upstream.sum(axes),
            0.9 * 0 + 0.1 * mean, 0.9 * 1 + 0.1 * variance)


def layer_on_ranks(names, graph):
    """Each case's output, gradients and moving statistics, for this rank's rows."""
    found = {}
    for name in names:
        x, upstream = rows_of(name)
        split = CASES[name][1]
        begin = sum(split[:hvd.rank()])
        mine = slice(begin, begin + split[hvd.rank()])
        channels = x.shape[-1]
        layer = hvd.SyncBatchNormalization(momentum=0.9, epsilon=EPS, dtype="float64")
        layer.build((None, *x.shape[1:]))
        layer.set_weights([np.arange(1, channels + 1) / 2, np.arange(channels) / 3,
                           np.zeros(channels), np.ones(channels)])

        def run(x, upstream, layer=layer):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
                total = tf.reduce_sum(upstream * y)
            return y, *tape.gradient(total, [x, layer.gamma.value, layer.beta.value])

        run = tf.function(run) if graph else run
        y, dx, d_gamma, d_beta = run(tf.constant(x[mine]), tf.constant(upstream[mine]))
        still = layer(tf.constant(x[mine]), training=False)
        found[name] = [np.array(one) for one in (
            y, dx, d_gamma, d_beta, layer.moving_mean, layer.moving_variance, still)]
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("graph", [False, True])
def test_equals_one_process_on_the_joined_batch(ranks, graph):
    by_rank = ranks(2, init="tensorflow").run(layer_on_ranks, tuple(CASES), graph, timeout=120)
    for name in CASES:
        x, upstream = rows_of(name)
        channels = x.shape[-1]
        y, dx, d_gamma, d_beta, mean, variance = oracle(
            x, upstream, np.arange(1, channels + 1) / 2, np.arange(channels) / 3)
        both = [rank[name] for rank in by_rank]
        loose = 1e-6 if name == "far from zero" else 1e-10  # 1e6 away, ten digits are left of sixteen
        for expected, found in [(y, np.concatenate([one[0] for one in both])),
                                (dx, np.concatenate([one[1] for one in both])),
                                (d_gamma, both[0][2] + both[1][2]), (d_beta, both[0][3] + both[1][3])]:
            np.testing.assert_allclose(found, expected, rtol=loose, atol=loose, err_msg=name)
        for one in both:
            np.testing.assert_allclose(one[4], mean, rtol=1e-10, err_msg=name)
            np.testing.assert_allclose(one[5], variance, rtol=1e-9, err_msg=name)
        np.testing.assert_array_equal(both[0][4], both[1][4])
        np.testing.assert_array_equal(both[0][5], both[1][5])


def net(kind=keras.layers.BatchNormalization):
    keras.utils.set_random_seed(3)
    inner = keras.Sequential([keras.Input((6,)), kind(), keras.layers.Dense(4, activation="tanh")])
    inputs = keras.Input((5,))
    x = keras.layers.Dense(6)(inputs)
    x = kind(momentum=0.5, scale=False)(x)
    x = inner(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def fit_converted():
    model = hvd.convert_sync_batchnorm(net())
    training.fit(model, hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)), hvd.rank(),
                 hvd.size(), callbacks=[hvd.callbacks.AssertReplicasEqualCallback(statistics=True)])
    return training.weights(model)


@pytest.mark.distributed
def test_a_converted_model_trains_as_one_process(ranks):
    by_rank = ranks(2, init="tensorflow").run(fit_converted, timeout=120)
    one = training.weights(training.fit_joined(net(), keras.optimizers.SGD(0.1, momentum=0.9), 2))
    for mine, other, reference in zip(*by_rank, one, strict=True):
        np.testing.assert_array_equal(mine, other)
        np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=2e-5)


def with_a_mask_and_a_set():
    """Masked rows count for nothing; ranks outside of the process set keep to their own batch."""
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(4, 3, 2)), np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
    mine = slice(2 * hvd.rank(), 2 * hvd.rank() + 2)
    layer = hvd.SyncBatchNormalization(dtype="float64")
    y = layer(tf.constant(x[mine]), training=True, mask=tf.constant(mask[mine]))
    one = keras.layers.BatchNormalization(dtype="float64")
    np.testing.assert_allclose(y, one(tf.constant(x), training=True, mask=tf.constant(mask))[mine],
                               atol=1e-6)
    alone = hvd.SyncBatchNormalization(dtype="float64", process_set=OnlyFirst())
    own = keras.layers.BatchNormalization(dtype="float64")
    np.testing.assert_allclose(alone(tf.constant(x[mine]), training=True),
                               own(tf.constant(x[mine]), training=True), atol=1e-12)


class OnlyFirst:
    """A process set of one rank, as this layer asks one."""

    def included(self):
        return hvd.rank() == 0

    def size(self):
        return 1


@pytest.mark.distributed
def test_masks_and_process_sets(ranks):
    ranks(2, init="tensorflow").run(with_a_mask_and_a_set)


def test_conversion_keeps_weights_names_and_what_is_frozen(tmp_path):
    model = net()
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=one.shape) ** 2 for one in model.get_weights()])
    model.layers[2].trainable = False
    copy = hvd.convert_sync_batchnorm(model)
    for mine, reference in zip(copy.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, reference)
    kinds = [type(layer) for layer in copy._flatten_layers()
             if isinstance(layer, keras.layers.BatchNormalization)]
    assert kinds == [hvd.SyncBatchNormalization] * 2
    assert [one.name for one in copy.layers[1:]] == [one.name for one in model.layers[1:]]  # without Input
    assert not copy.layers[2].trainable
    assert not any(isinstance(layer, hvd.SyncBatchNormalization) for layer in model._flatten_layers())
    x = rng.normal(size=(4, 5)).astype("float32")
    np.testing.assert_array_equal(copy(x), model(x))
    copy.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.layers[2], hvd.SyncBatchNormalization)
    np.testing.assert_array_equal(loaded(x), model(x))


def test_what_cannot_be_converted():
    class Own(keras.Model):
        pass

    class OwnNorm(keras.layers.BatchNormalization):
        pass

    with pytest.raises(TypeError, match=r"must be a keras\.Model"):
        hvd.convert_sync_batchnorm(keras.layers.BatchNormalization())
    with pytest.raises(ValueError, match="Own is not a functional or Sequential model"):
        hvd.convert_sync_batchnorm(Own())
    with pytest.raises(ValueError, match="inside of another layer, or of a class of its own"):
        hvd.convert_sync_batchnorm(keras.Sequential([keras.Input((3,)), OwnNorm()]))
    with pytest.raises(ValueError, match="fused must be False"):
        hvd.SyncBatchNormalization(fused=True)


BATCHES = ((3, 4), (2, 2))  # by rank: how many batches, of how many rows


def batches_of(rank):
    rng = np.random.default_rng([5, rank])
    count, size = BATCHES[rank]
    return [(rng.normal(size=(size, 5)) + rank, rng.normal(size=(size, 3))) for _ in range(count)]


def normalised(kind):
    keras.utils.set_random_seed(3)
    return keras.Sequential([
        keras.Input((5,), dtype="float64"), keras.layers.Dense(6, dtype="float64"),
        kind(momentum=0.5, dtype="float64"), keras.layers.Dense(3, dtype="float64")])


def step_of(model, optimizer):
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    return step


def uneven_on_ranks(graph):
    model = normalised(hvd.SyncBatchNormalization)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.125))
    step = step_of(model, optimizer)
    run = tf.function(step, reduce_retracing=True) if graph else step
    with hvd.uneven_inputs(optimizer, average_over="samples") as data:
        for x, y in data.batches(batches_of(hvd.rank())):
            run(tf.constant(x), tf.constant(y))
    hvd.assert_replicas_equal(model, statistics=True)
    return training.weights(model)


@pytest.mark.distributed
@pytest.mark.parametrize("graph", [False, True])
def test_a_rank_without_a_batch_has_no_part_in_the_statistics(ranks, graph):
    first, _ = ranks(2, init="tensorflow").run(uneven_on_ranks, graph, timeout=120)
    model = normalised(keras.layers.BatchNormalization)
    step, by_rank = step_of(model, keras.optimizers.SGD(0.125)), [batches_of(rank) for rank in range(2)]
    for number in range(3):
        now = [batches[number] for batches in by_rank if number < len(batches)]
        step(*(np.concatenate(parts) for parts in zip(*now, strict=True)))
    for mine, one in zip(first, training.weights(model), strict=True):
        np.testing.assert_allclose(mine, one, rtol=1e-10, atol=1e-12)


def padded_with_statistics(eagerly):
    """A dataset in which a rank sees a batch again, and a layer that would join it or is elsewhere."""
    data = tf.data.Dataset.from_tensor_slices((np.zeros((8, 5)), np.zeros((8, 3)))).batch(2)
    mine = data.take(2 + hvd.rank())
    optimizer, others = (hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)) for _ in range(2))
    plain, model = map(normalised, (keras.layers.BatchNormalization, hvd.SyncBatchNormalization))
    plain.compile(optimizer, "mse", run_eagerly=eagerly)
    model.compile(others, "mse", run_eagerly=eagerly)
    again = hvd.uneven_inputs(optimizer).padded(mine)
    plain.fit(again, verbose=0)
    model.fit(data, verbose=0)  # while the padded dataset of the other model is there
    model = normalised(hvd.SyncBatchNormalization)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    model.compile(optimizer, "mse", run_eagerly=eagerly)
    before = training.weights(model)
    with pytest.raises(ValueError, match=r"enter the statistics.*batches\(dataset\)"):
        model.fit(hvd.uneven_inputs(optimizer).padded(mine), verbose=0)
    np.testing.assert_equal(training.weights(model)[:2], before[:2])
    with pytest.raises(ValueError, match=r"padded\(\) with SyncBatchNormalization"):
        hvd.uneven_inputs(optimizer).padded(mine)
    model.fit(hvd.uneven_inputs(optimizer).padded(data), verbose=0)  # as many on every rank
    model.trainable = False
    hvd.uneven_inputs(optimizer).padded(mine)
    return True


@pytest.mark.distributed
@pytest.mark.parametrize("eagerly", [False, True])
def test_padded_batches_are_refused(ranks, eagerly):
    assert ranks(2, init="tensorflow").run(padded_with_statistics, eagerly, timeout=120) == [True, True]


def discriminator_without_gradients():
    """A layer in the step whose own weights another optimizer trains, or nobody does."""
    data = tf.data.Dataset.from_tensor_slices((np.zeros((8, 5)), np.zeros((8, 3)))).batch(2)
    for scaled in (True, False):
        behind = hvd.SyncBatchNormalization(center=scaled, scale=scaled, dtype="float64")
        model = keras.Sequential([keras.Input((5,), dtype="float64"), keras.layers.Dense(3, dtype="float64")])
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
        padded = hvd.uneven_inputs(optimizer).padded(data.take(2 + hvd.rank()))

        @tf.function
        def step(x, model=model, behind=behind, optimizer=optimizer):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(behind(model(x), training=True) ** 2)
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        with pytest.raises(ValueError, match=r"padded\(\) with SyncBatchNormalization"):
            step(next(iter(padded))[0])
    return True


@pytest.mark.distributed
def test_padded_batches_are_refused_for_any_layer_of_the_step(ranks):
    assert ranks(2, init="tensorflow").run(discriminator_without_gradients, timeout=120) == [True, True]

"""Ranks that run out of batches at different times: against NumPy, and against gradients of zero."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.tensorflow import training  # noqa: E402

BATCHES = {"two and five": ((2, 4), (5, 2)), "one has none": ((3, 4), (0, 4))}  # rank: (batches, rows)
RATE, MOMENTUM, CLIP = 0.125, 0.875, 0.25  # Keras takes them to float32: numbers that float32 has
OPTIONS = {
    "plain": dict,
    "rank0": lambda: {"server": "rank0"},
    "sharded": lambda: {"server": "sharded"},
    "topk of everything": lambda: {"compression": hvd.Compression.topk(1.0, min_size=1)},
    "delay without compensation": lambda: {"op": hvd.DelayCompensated(lam=0.0, adaptive=False)},
}
OTHERS = {
    "topk": lambda: {"compression": hvd.Compression.topk(0.3, min_size=1)},
    "powersgd": lambda: {"compression": hvd.Compression.powersgd(1)},
    "delay": lambda: {"op": hvd.DelayCompensated(lam=2.0)},
    "topk, sharded": lambda: {"compression": hvd.Compression.topk(0.3, min_size=1), "server": "sharded"},
}


def rows(name, rank):
    """This rank's batches of (x, y), float64."""
    rng = np.random.default_rng(rank)
    count, size = BATCHES[name][rank]
    return [(rng.normal(size=(size, 3)), rng.normal(size=(size, 2))) for _ in range(count)]


def model_of():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((3,), dtype="float64"),
                             keras.layers.Dense(2, use_bias=False, dtype="float64")])


def by_numpy(name, weigh):
    """Heavy-ball steps on the weighed mean of the ranks' gradients."""
    w = training.weights(model_of())[0]
    momentum, data = np.zeros_like(w), [rows(name, rank) for rank in range(2)]
    for step in range(max(map(len, data))):
        now = [batches[step] for batches in data if step < len(batches)]
        gradients = [2 * x.T @ (x @ w - y) / y.size for x, y in now]
        sizes = [len(x) for x, _ in now]
        divisors = {"ranks": [2] * len(now), "active": [len(now)] * len(now),
                    "samples": [sum(sizes) / size for size in sizes]}[weigh]
        momentum = MOMENTUM * momentum - RATE * sum(g / by for g, by in zip(gradients, divisors, strict=True))
        w = w + momentum
    return w


def stepper(model, optimizer, graph):
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return tf.function(step) if graph else step


def dataset(name):
    _, size = BATCHES[name][hvd.rank()]
    flat = rows(name, hvd.rank()) or [(np.zeros((0, 3)), np.zeros((0, 2)))]
    x, y = (np.concatenate(parts) for parts in zip(*flat, strict=True))
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(size)


def clipped(name):
    """Weights with ``clipnorm``, which acts on the weighed mean: on ranks, and by NumPy."""
    model = model_of()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE, clipnorm=CLIP))
    step = stepper(model, optimizer, True)
    with hvd.uneven_inputs(optimizer) as data:
        for x, y in data.batches(dataset(name)):
            step(x, y)
    w, batches = training.weights(model_of())[0], [rows(name, rank) for rank in range(2)]
    for number in range(max(map(len, batches))):
        now = [mine[number] for mine in batches if number < len(mine)]
        g = sum(2 * x.T @ (x @ w - y) / y.size for x, y in now) / 2
        w = w - RATE * g * min(1.0, CLIP / np.linalg.norm(g))
    return training.weights(model)[0], w


def all_clipped():
    return [clipped(name) for name in BATCHES]


@pytest.mark.distributed
def test_clipping_acts_on_the_mean_of_all_ranks(ranks):
    first, second = ranks(2, init="tensorflow").run(all_clipped)
    for (mine, expected), (other, _) in zip(first, second, strict=True):
        np.testing.assert_array_equal(mine, other)
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-12)


def trained(name, option, weigh, graph):
    model = model_of()
    options = {**OPTIONS, **OTHERS}[option]()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE, momentum=MOMENTUM), **options)
    step, seen = stepper(model, optimizer, graph), 0
    with hvd.uneven_inputs(optimizer, weigh) as data:
        for x, y in data.batches(dataset(name)):
            step(x, y)
            seen += 1
    hvd.assert_replicas_equal(model)
    assert int(optimizer.iterations) == seen == max(count for count, _ in BATCHES[name])
    return training.weights(model)[0]


def with_zeros(name, option):
    """The same by gradients of zero, given by hand on the rank that has run out."""
    model = model_of()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE, momentum=MOMENTUM),
                                         **{**OPTIONS, **OTHERS}[option]())
    step, batches = stepper(model, optimizer, False), rows(name, hvd.rank())
    for number in range(max(count for count, _ in BATCHES[name])):
        if number < len(batches):
            step(*map(tf.constant, batches[number]))
        else:
            optimizer.apply([tf.zeros(one.shape, one.dtype) for one in model.trainable_variables],
                            model.trainable_variables)
    return training.weights(model)[0]


def against_numpy(cases):
    return [trained(*case) for case in cases]


@pytest.mark.distributed
def test_equals_numpy_for_every_weighing(ranks):
    cases = [(name, option, "ranks", True) for name in BATCHES for option in OPTIONS]
    cases += [("two and five", "plain", weigh, graph) for weigh in ("active", "samples") for graph in (0, 1)]
    cases += [("two and five", option, "active", True) for option in OPTIONS if option != "plain"]
    cases += [("two and five", option, "samples", True) for option in ("sharded", "topk of everything")]
    first, second = ranks(2, init="tensorflow").run(against_numpy, cases, timeout=300)
    for case, mine, other in zip(cases, first, second, strict=True):
        np.testing.assert_array_equal(mine, other, err_msg=str(case))
        loose = 1e-5 if case[1].startswith(("topk", "delay")) else 1e-12  # these send float32
        np.testing.assert_allclose(mine, by_numpy(case[0], case[2]), atol=loose, err_msg=str(case))


def against_zeros(names):
    return [(trained("two and five", one, "ranks", True), with_zeros("two and five", one)) for one in names]


@pytest.mark.distributed
def test_a_shadow_is_a_rank_with_gradients_of_zero(ranks):
    for pairs in ranks(2, init="tensorflow").run(against_zeros, tuple(OTHERS), timeout=200):
        for name, (mine, expected) in zip(OTHERS, pairs, strict=True):
            np.testing.assert_allclose(mine, expected, atol=1e-6, err_msg=name)  # float32 is sent


def overflows(graph, spoiled):
    """Loss scale, iterations and weights after a first step that overflows: the loss scale's, or of data.

    ``spoiled``: the batch that rank 1 shadows with, its last one, has an infinite row, of which a shadow's
    gradients must not tell; the scale itself overflows nothing then.
    """
    model = model_of()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(RATE), initial_scale=2.0 ** (4 if spoiled else 18)))

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.cast(tf.reduce_mean((model(x) - y) ** 2), tf.float16)  # so that gradients overflow
            scaled = optimizer.scale_loss(tf.cast(loss, tf.float32))
        optimizer.apply(tape.gradient(scaled, model.trainable_variables), model.trainable_variables)

    batches = rows("two and five", hvd.rank())
    if spoiled and hvd.rank() == 0:
        batches[-1] = (batches[-1][0] * np.inf, batches[-1][1])
    run = tf.function(step) if graph else step
    with hvd.uneven_inputs(optimizer) as data:
        for x, y in data.batches([tuple(map(tf.constant, batch)) for batch in batches]):
            run(x, y)
    hvd.assert_replicas_equal(model)
    return float(optimizer.dynamic_scale), int(optimizer.iterations), training.weights(model)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("graph", [False, True])
def test_a_step_that_overflows_is_one_of_the_loop(ranks, graph):
    pool = ranks(2, init="tensorflow")
    for scale, iterations, weight in pool.run(overflows, graph, False, timeout=120):
        assert (scale, iterations) == (2.0**15, 2)
        assert np.isfinite(weight).all()
    # Rank 0 has two batches; in the second all skip, in the three that it shadows nobody does.
    for scale, iterations, weight in pool.run(overflows, graph, True, timeout=120):
        assert (scale, iterations) == (8.0, 4)
        assert np.isfinite(weight).all()


def faults():
    """What goes wrong on one rank is an error on all; afterwards training goes on."""
    model = model_of()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    step = stepper(model, optimizer, True)

    def leave_early():
        with hvd.uneven_inputs(optimizer) as data:
            for x, y in data.batches(dataset("two and five")):
                step(x, y)
                if hvd.rank() == 1:
                    break

    with pytest.raises(RuntimeError, match="this rank left" if hvd.rank() == 1 else "rank 1 left"):
        leave_early()

    def broken():
        yield from rows("two and five", hvd.rank())[:1]
        if hvd.rank() == 0:
            raise OSError("no such file")
        yield from rows("two and five", hvd.rank())[1:]

    def read():
        with hvd.uneven_inputs(optimizer) as data:
            for x, y in data.batches(broken()):
                step(tf.constant(x), tf.constant(y))

    with pytest.raises(OSError if hvd.rank() == 0 else RuntimeError,
                       match="no such file" if hvd.rank() == 0 else "rank 0 left"):
        read()

    def differ():
        with hvd.uneven_inputs(optimizer, "active" if hvd.rank() else "samples") as data:
            for x, y in data.batches(dataset("two and five")):
                step(x, y)

    with pytest.raises(ValueError, match=r"average_over= of hvd\.uneven_inputs differ"):
        differ()
    with hvd.uneven_inputs(optimizer) as data:
        for x, y in data.batches(dataset("two and five")):
            step(x, y)
    hvd.assert_replicas_equal(model)
    return True


def traced_too_early():
    model = model_of()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    step = stepper(model, optimizer, True)
    batch = tf.constant(rows("two and five", 0)[0][0]), tf.constant(rows("two and five", 0)[0][1])
    step(*batch)
    with pytest.raises(RuntimeError, match="before the first step"):  # noqa: PT012, SIM117
        with hvd.uneven_inputs(optimizer) as data:
            for x, y in data.batches([batch, batch]):
                step(x, y)


@pytest.mark.distributed
def test_errors_come_on_all_ranks(ranks):
    pool = ranks(2, init="tensorflow")
    pool.run(faults, timeout=120)
    pool.run(traced_too_early)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"hvd\.DistributedOptimizer returned"):
        hvd.uneven_inputs(keras.optimizers.SGD(0.1))


def refused():
    with pytest.raises(ValueError, match="average_over"):
        hvd.uneven_inputs(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "rows")
    with pytest.raises(ValueError, match=r"average_over='active' needs a mean .* has op=Sum;"):
        hvd.uneven_inputs(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), op=hvd.Sum), "active")
    with pytest.raises(ValueError, match="average_over='samples' and DelayCompensated"):
        hvd.uneven_inputs(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), op=hvd.DelayCompensated()),
                          "samples")
    data = hvd.uneven_inputs(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)))
    with pytest.raises(RuntimeError, match="outside of its block"):
        next(data.batches([]))


@pytest.mark.distributed
def test_weighings_that_have_no_meaning(ranks):
    ranks(2, init="tensorflow").run(refused)


def fitted(name, option, weigh):
    model = model_of()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE, momentum=MOMENTUM), **OPTIONS[option]())
    model.compile(optimizer, loss=keras.losses.MeanSquaredError(dtype="float64"))
    data = hvd.uneven_inputs(optimizer, weigh).padded(dataset(name))
    steps = max(count for count, _ in BATCHES[name])
    assert int(data.cardinality()) == steps
    model.fit(data, verbose=0, shuffle=False)
    hvd.assert_replicas_equal(model)
    assert int(optimizer.iterations) == steps
    return training.weights(model)[0]


def all_fitted(cases):
    return [fitted(*case) for case in cases]


@pytest.mark.distributed
def test_fit_on_padded_data_equals_numpy(ranks):
    cases = [(name, option, "ranks") for name in BATCHES for option in ("plain", "topk of everything")]
    cases += [("two and five", "delay without compensation", "ranks"), ("one has none", "sharded", "ranks")]
    cases += [("two and five", "plain", weigh) for weigh in ("active", "samples")]
    first, second = ranks(2, init="tensorflow").run(all_fitted, cases, timeout=200)
    for case, mine, other in zip(cases, first, second, strict=True):
        np.testing.assert_array_equal(mine, other, err_msg=str(case))
        np.testing.assert_allclose(mine, by_numpy(case[0], case[2]), atol=1e-7, err_msg=str(case))


def padded_wrong():
    """What each rank is told of data that cannot be padded."""
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    good = tf.data.Dataset.from_tensors((tf.ones((2, 3)), tf.ones((2, 2)), tf.ones((2,)))).repeat(2)
    broken = good.map(lambda x, y, w: (tf.debugging.check_numerics(x / 0, "of data"), y, w))
    last, said = hvd.rank() == 1, []
    for weigh, data in [("ranks", good.repeat() if last else good), ("samples", broken if last else good),
                        ("ranks", good.map(lambda x, y, w: x) if last else good),
                        ("active" if last else "samples", good), ("ranks", good.take(0))]:
        try:
            hvd.uneven_inputs(optimizer, weigh).padded(data)
            said.append("nothing")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    weighed = hvd.uneven_inputs(optimizer, "active").padded(good if last else good.take(1))
    return said, [w.numpy().tolist() for _, _, w in weighed]


@pytest.mark.distributed
def test_data_that_cannot_be_padded_is_an_error_on_all_ranks(ranks):
    (first, weights), (second, others) = ranks(2, init="tensorflow").run(padded_wrong)
    assert first[0] == second[0]
    assert "ValueError: the dataset of rank 1 has no end" in first[0]
    assert "RuntimeError: the dataset of rank 1 cannot be padded: InvalidArgumentError" in first[1]
    assert "InvalidArgumentError" in second[1]
    assert "RuntimeError: the dataset of rank 1 cannot be padded: TypeError" in first[2]
    assert "TypeError: padded() gives some batches the sample weight 0" in second[2]
    assert first[3] == second[3]
    assert "average_over= of hvd.uneven_inputs differ: ['samples', 'active'] by rank" in first[3]
    assert first[4] == second[4] == "ValueError: no rank's dataset has a batch"
    assert weights == [[1.0, 1.0], [0.0, 0.0]]
    assert others == [[1.0, 1.0], [2.0, 2.0]]

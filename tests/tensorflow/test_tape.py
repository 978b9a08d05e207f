"""Distributed tapes: the joined batch's gradient, in eager mode and in tf.function, traced once."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow as hvd  # noqa: E402
from hvd_ext.tensorflow.consistency import handshake  # noqa: E402
from hvd_ext.tensorflow.consistency.weight_digest import digest_tensors  # noqa: E402
from hvd_ext.tensorflow.tape import KEPT, MOST_KEPT  # noqa: E402
from tests.tensorflow import training  # noqa: E402


def train(distribute, rank, size, compiled, sparse=False):
    """Five steps of SGD with a tape; the weights, and how often the step was traced."""
    model = training.embedding_model() if sparse else training.dense_model()
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    x, y = training.data()
    if sparse:
        x = (np.abs(x) * 3).astype("int32") % 6
    traced = []

    def step(x, y):
        traced.append(1)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        gradients = distribute(tape).gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    run = tf.function(step) if compiled else step
    rows = training.BATCH * 2
    for start in range(0, 5 * rows, rows):
        run(tf.constant(x[start:start + rows][rank::size]),
            tf.constant(y[start:start + rows][rank::size]))
    return training.weights(model), len(traced)


def tapes_on_ranks(compiled):
    rank, size = hvd.rank(), hvd.size()
    found = {
        "plain": train(hvd.DistributedGradientTape, rank, size, compiled),
        "groups": train(lambda tape: hvd.DistributedGradientTape(tape, groups=2), rank, size,
                        compiled),
        "slices": train(hvd.DistributedGradientTape, rank, size, compiled, True),
        "dense": train(lambda tape: hvd.DistributedGradientTape(tape, sparse_as_dense=True), rank,
                       size, compiled, True),
        "optimizer": None,
    }
    model = training.dense_model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9))
    x, y = training.data()

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    run = tf.function(step) if compiled else step
    for start in range(0, 40, 8):
        run(tf.constant(x[start:start + 8][rank::size]), tf.constant(y[start:start + 8][rank::size]))
    found["optimizer"] = training.weights(model), 1
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("compiled", [False, True])
def test_tape_equals_one_process(ranks, compiled):
    by_rank = ranks(2, init="tensorflow").run(tapes_on_ranks, compiled)
    for case in by_rank[0]:
        sparse = case in ("slices", "dense")
        reference, _ = train(lambda tape: tape, 0, 1, False, sparse)
        for (weights, traced), (first, _) in zip([rank[case] for rank in by_rank],
                                                 [by_rank[0][case]] * 2, strict=True):
            if compiled:
                assert traced == 1 or case == "optimizer" or traced == 2  # variables are made once
            for mine, one, same in zip(weights, reference, first, strict=True):
                np.testing.assert_allclose(mine, one, atol=1e-5, rtol=1e-5)
                np.testing.assert_array_equal(mine, same)


def local_sources():
    a, b = tf.Variable([2.0, 3.0]), tf.Variable(1.0)
    scale = float(hvd.rank() + 1)
    with tf.GradientTape(persistent=True) as tape:
        loss = scale * (tf.reduce_sum(a) + b)
    wrapped = hvd.DistributedGradientTape(tape)
    wrapped.register_local_source(b)
    kept, reduced = wrapped.get_local_and_global_gradients(loss, [a, b])
    unscaled = hvd.DistributedGradientTape(tape, scale_local_gradients=False)
    unscaled.register_local_source(b)
    structured = hvd.DistributedGradientTape(tape).gradient(loss, {"a": a, "rest": [b, a]})
    layer = keras.layers.Dense(1)
    layer.build((None, 1))
    with tf.GradientTape() as second:
        loss = scale * tf.reduce_sum(layer(tf.ones((1, 1))))
    partial = hvd.PartialDistributedGradientTape(second, local_layers=layer)
    mine = partial.gradient(loss, layer.trainable_variables)
    return (float(kept[0][1]), reduced[0][1].numpy().tolist(),
            float(unscaled.gradient(loss_of(unscaled, a, b, scale), [b])[0]),
            structured["a"].numpy().tolist(), float(structured["rest"][0]), float(mine[1][0]))


def loss_of(tape, a, b, scale):
    with tape:
        loss = scale * (tf.reduce_sum(a) + b)
    return loss


@pytest.mark.distributed
def test_local_sources_and_structures(ranks):
    first, second = ranks(2, init="tensorflow").run(local_sources)
    assert first == (0.5, [1.5, 1.5], 1.0, [1.5, 1.5], 1.5, 0.5)
    assert second == (1.0, [1.5, 1.5], 2.0, [1.5, 1.5], 1.5, 1.0)


def test_bad_input():
    with pytest.raises(TypeError, match=r"must be a tf\.GradientTape"):
        hvd.DistributedGradientTape(None)
    wrapped = hvd.DistributedGradientTape(tf.GradientTape())
    with pytest.raises(ValueError, match="distributed already"):
        hvd.DistributedGradientTape(wrapped)
    with pytest.raises(ValueError, match="local_layers must be Keras layers"):
        hvd.PartialDistributedGradientTape(tf.GradientTape(), local_layers=[3])

    @tf.function(jit_compile=True)
    def step(weight):
        with tf.GradientTape() as tape:
            tape.watch(weight)
            loss = weight * weight
        return hvd.DistributedGradientTape(tape).gradient(loss, [weight])

    with pytest.raises(NotImplementedError, match="jit_compile=False"):
        step(tf.constant(1.0))


def extension_cases():
    """Arguments of a tape by name, and whether they need a Keras model."""
    topk = hvd.Compression.topk(0.3, min_size=0)
    return {
        "delay": lambda model: {"op": hvd.DelayCompensated()},
        "topk": lambda model: {"compression": topk},
        "seng": lambda model: {"preconditioner": hvd.SENG(model, damping=0.5, update_freq=2)},
    }


def tape_step(model, weights, optimizer, options, traced):
    """A training step with a distributed tape, which counts how often it is traced."""

    def step(x, y):
        traced.append(1)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        tape = hvd.DistributedGradientTape(tape, optimizer=optimizer, **options)
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))

    return step


def batches(first, last):
    x, y = training.data()
    for number in range(first, last):
        rows = slice(8 * number, 8 * number + 8)
        yield tf.constant(x[rows][hvd.rank()::2]), tf.constant(y[rows][hvd.rank()::2])


def plain_variables():
    """The dense model as a function of tf.Variables."""
    keras_model = training.dense_model()
    a, b, c, d = (tf.Variable(weight, name=f"w{n}") for n, weight in
                  enumerate(keras_model.get_weights()))
    return lambda x: tf.tanh(x @ a + b) @ c + d, [a, b, c, d]


def extensions_with_a_tape(folder):
    """Weights of five steps by case: eager, traced, with tf.Variables, restored after three."""
    found, traces = {}, {}
    for name, make in extension_cases().items():
        for way in ("eager", "traced", "variables"):
            if way == "variables":
                if name == "seng":
                    continue
                model, weights = plain_variables()
            else:
                model = training.dense_model()
                weights = model.trainable_variables
            optimizer, traced = keras.optimizers.Adam(0.01), []
            options = make(model)
            step = tape_step(model, weights, optimizer, options, traced)
            run = step if way == "eager" else tf.function(step)
            for number, batch in enumerate(batches(0, 5)):
                run(*batch)
                if (number, way) == (2, "traced"):
                    parts = {"model": model, "optimizer": optimizer}
                    seng = options.get("preconditioner")
                    parts.update({"seng": seng} if seng is not None else {})
                    stem = tf.train.Checkpoint(**parts).write(f"{folder}/{name}{hvd.rank()}")
            found[name, way] = [np.array(weight) for weight in weights]
            traces[name, way] = len(traced)
        found[name, "restored"] = restored(make, stem)
        model = training.dense_model()
        wrapped = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), **make(model))
        model.compile(wrapped, "mse")
        for batch in batches(0, 5):
            model.train_on_batch(*batch)
        found[name, "optimizer"] = training.weights(model)
    return found, traces


def restored(make, stem):
    """Two steps from a checkpoint, in objects that are new."""
    model = training.dense_model()
    for weight in model.weights:
        weight.assign(weight * 0)
    optimizer, options = keras.optimizers.Adam(0.01), make(model)
    parts = {"model": model, "optimizer": optimizer}
    if "preconditioner" in options:
        parts["seng"] = options["preconditioner"]
    tape = hvd.DistributedGradientTape(tf.GradientTape(), optimizer=optimizer, **options)
    tape.build(model.trainable_variables)
    tf.train.Checkpoint(**parts).read(stem).assert_existing_objects_matched()
    run = tf.function(tape_step(model, model.trainable_variables, optimizer, options, []))
    for batch in batches(3, 5):
        run(*batch)
    return training.weights(model)


@pytest.mark.distributed
def test_every_extension_with_a_tape(ranks, tmp_path):
    by_rank = ranks(2, init="tensorflow").run(extensions_with_a_tape, str(tmp_path), timeout=200)
    for found, traces in by_rank:
        for (name, way), weights in found.items():
            for mine, first, traced in zip(weights, by_rank[0][0][name, way], found[name, "traced"],
                                           strict=True):
                np.testing.assert_array_equal(mine, first)
                if way == "restored":
                    np.testing.assert_array_equal(mine, traced)
                np.testing.assert_allclose(mine, traced, rtol=1e-4, atol=1e-6)
        assert all(count <= 2 for (_, way), count in traces.items() if way != "eager"), traces


def lives_of_models():
    """Whether models that tapes have seen are freed, and how many reducers one variable keeps."""
    freed = []
    for _ in range(2):
        variable = tf.Variable([1.0, 2.0])
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable * variable)
        hvd.DistributedGradientTape(tape).gradient(loss, [variable])
        gone = weakref.ref(variable)
        del variable, tape, loss
        gc.collect()
        freed.append(gone() is None)
    variable = tf.Variable([1.0, 2.0])
    for number in range(9):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable * variable)
        wrapped = hvd.DistributedGradientTape(tape, gradient_predivide_factor=1.0 + number)
        gradient = wrapped.gradient(loss, [variable])[0].numpy().tolist()
    return freed, len(variable.__dict__[KEPT]), gradient


def graphs_one_after_another():
    """Gradients in graphs that are gone when the next one is made, then in eager mode."""
    found = []
    for _ in range(2):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            variable = tf.Variable([1.0, float(hvd.rank())])
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(variable * variable)
            gradient = hvd.DistributedGradientTape(tape).gradient(loss, [variable])[0]
            session.run(tf.compat.v1.global_variables_initializer())
            found.append(session.run(gradient).tolist())
    variable = tf.Variable([1.0, float(hvd.rank())])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(variable * variable)
    found.append(hvd.DistributedGradientTape(tape).gradient(loss, [variable])[0].numpy().tolist())
    return found


@pytest.mark.distributed
def test_nothing_outlives_a_model_and_its_graph(ranks):
    for freed, kept, gradient in ranks(2, init="tensorflow").run(lives_of_models):
        assert freed == [True, True]
        assert kept <= MOST_KEPT
        np.testing.assert_allclose(gradient, [2.0, 4.0])
    for found in ranks(2, init="tensorflow").run(graphs_one_after_another):
        assert found == [[2.0, 1.0]] * 3


def scaled_steps(scale, op, compression):
    """Weights after steps whose loss is scaled and whose gradients are unscaled after the tape."""
    variable = tf.Variable(np.linspace(-1.0, 1.0, 12).astype("float32"))
    optimizer = keras.optimizers.SGD(0.2, loss_scale_factor=scale)
    options = {} if op is None else {"op": hvd.DelayCompensated(lam=4.0, adaptive=op == "adaptive")}
    if compression:
        options["compression"] = hvd.Compression.topk(0.25, min_size=0)
    for step in range(4):
        target = tf.constant(np.random.default_rng([hvd.rank(), step]).standard_normal(12), tf.float32)
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(tf.reduce_sum((variable - target) ** 2))
        tape = hvd.DistributedGradientTape(tape, optimizer=optimizer, **options)
        optimizer.apply(tape.gradient(loss, [variable]), [variable])
    return variable.numpy()


@pytest.mark.distributed
@pytest.mark.parametrize(("op", "compression"), [("adaptive", False), ("constant", False), (None, True)])
def test_the_loss_scale_does_not_reach_what_is_not_linear(ranks, op, compression):
    pool = ranks(2, init="tensorflow")
    plain = pool.run(scaled_steps, None, op, compression)
    scaled = pool.run(scaled_steps, 256.0, op, compression)
    np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-5)
    np.testing.assert_array_equal(scaled[0], scaled[1])


def after_other_models():
    """Rank 1 has made models that rank 0 has not: Keras' names have other numbers there."""
    for _ in range(hvd.rank()):
        training.dense_model()
    names = [one.path for one in training.dense_model().trainable_variables]
    found = [train(hvd.DistributedGradientTape, hvd.rank(), hvd.size(), compiled, sparse)[0]
             for compiled in (False, True) for sparse in (False, True)]
    return names, found


@pytest.mark.distributed
def test_names_of_layers_may_differ_between_ranks(ranks):
    (names, found), (other_names, other) = ranks(2, init="tensorflow").run(after_other_models)
    assert names != other_names
    for mine, theirs in zip(found, other, strict=True):
        for one, same in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(one, same)


def start_apart(compiled, sparse, options, broadcast):
    """Steps from weights that are other ones on rank 1: the error, or weights and comparisons made."""
    model = training.embedding_model() if sparse else training.dense_model()
    for weight in model.trainable_variables:
        weight.assign(weight + 1e-3 * hvd.rank())
    optimizer = keras.optimizers.SGD(0.1)
    run = tape_step(model, model.trainable_variables, optimizer, options, [])
    run = tf.function(run) if compiled else run
    for number, (x, y) in enumerate(batches(0, 4)):
        try:
            run(tf.cast(tf.abs(x) * 3, tf.int32) % 6 if sparse else x, y)
        except Exception as error:
            return number, str(error)
        if broadcast and not number:  # as Horovod's examples do
            hvd.broadcast_variables(model.variables, root_rank=0)
    return training.weights(model), len(COMPARED)


COMPARED = []


def digest(arrays):
    COMPARED.append(1)
    return digest_tensors(arrays)


def start_apart_each_way():
    handshake.digest_tensors = digest
    topk = {"compression": hvd.Compression.topk(0.3, min_size=0)}
    return [COMPARED.clear() or start_apart(*case) for case in (
        (False, False, {}, False), (True, False, {}, False), (True, True, {}, False),
        (True, False, topk, False), (False, False, {}, True), (True, True, {}, True))]


@pytest.mark.distributed
def test_replicas_that_begin_with_different_weights(ranks):
    by_rank = ranks(2, init="tensorflow").run(start_apart_each_way, timeout=200)
    for found in by_rank:
        for number, said in found[:4]:
            assert number == 1  # as with an optimizer: scripts broadcast before the first step or after it
            assert "the replicas begin with different weights" in said
            assert "call hvd.broadcast_variables(model.variables, root_rank=0)" in said
        for (weights, compared), (first, _) in zip(found[4:], by_rank[0][4:], strict=True):
            assert compared == 1
            for mine, other in zip(weights, first, strict=True):
                np.testing.assert_array_equal(mine, other)

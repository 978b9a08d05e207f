"""Gradients applied one step late in Keras: the oracle, every reducer a step behind itself, state."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.reference.async_sgd import trajectory  # noqa: E402
from tests.tensorflow import synthetic_steps, training  # noqa: E402

SHAPES = [(12, 9), (5,), (10, 3, 4), (20, 21)]
N = sum(int(np.prod(shape)) for shape in SHAPES)
STEPS = 8
RULES = {"constant": {"lam": 0.3, "adaptive": False}, "adaptive": {"lam": 1.5, "decay": 0.9},
         "none": {"lam": 0.0}}

# A quadratic whose gradient at w is curvature * w plus noise of rank and step.


def curvature():
    return np.random.default_rng(1).uniform(0.2, 2.0, N)


def noise(rank, step):
    return np.random.default_rng([2, rank, step]).standard_normal(N)


def on_a_quadratic(cases):
    """By case, the flat weights after each step, and after flush() twice."""
    found = {}
    for case in cases:
        rule, momentum, compiled = case
        variables = synthetic_steps.make_variables(SHAPES)
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=momentum),
                                             overlap=hvd.DelayedUpdate(**RULES[rule]))

        def own(step, gradients, variables=variables):
            whole = curvature() * synthetic_steps.flat(variables) + noise(hvd.rank(), step)
            pieces = np.split(whole, np.cumsum([g.shape.num_elements() for g in gradients])[:-1])
            return [tf.constant(piece.reshape(g.shape), tf.float32)
                    for piece, g in zip(pieces, gradients, strict=True)]

        seen = [synthetic_steps.flat(variables),
                *synthetic_steps.run_steps(optimizer, variables, hvd.rank(), STEPS,
                                           compiled=compiled, change=own)]
        assert int(optimizer.iterations) == STEPS - 1  # the first is not taken
        optimizer.flush()
        optimizer.flush()  # there is nothing more
        assert int(optimizer.iterations) == STEPS
        assert optimizer.report()["overlap"]["updates"] == STEPS
        hvd.assert_replicas_equal(variables, optimizer=optimizer)
        found[case] = np.stack([*seen, synthetic_steps.flat(variables)])
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
def test_every_weight_is_the_oracles(ranks, size):
    cases = [("adaptive", 0.5, True), ("constant", 0.0, False), ("none", 0.9, True)][:3 if size == 2 else 1]
    start = synthetic_steps.flat(synthetic_steps.make_variables(SHAPES))
    for found in ranks(size, init="tensorflow").run(on_a_quadratic, cases, timeout=150):
        for rule, momentum, compiled in cases:
            settings = RULES[rule]
            seen = found[rule, momentum, compiled]
            expected = trajectory(
                lambda w, k: curvature() * w + np.mean([noise(rank, k) for rank in range(size)], axis=0),
                start, [0] + [1] * (STEPS - 1), lr=0.05, momentum=momentum, lam=settings["lam"],
                rule="dc-asgd-a" if settings.get("adaptive", True) else "dc-asgd-c",
                decay=settings.get("decay", 0.95))
            np.testing.assert_array_equal(seen[0], seen[1])  # the first step changes nothing
            np.testing.assert_allclose(seen[1:], expected, rtol=2e-4, atol=2e-5)


# With gradients that do not depend on the weights, and no compensation, a run is late by one step in all.

TOPK = {"ratio": 0.1, "min_size": 0}
REDUCERS = {
    "plain": dict,
    "topk": lambda: {"compression": hvd.Compression.topk(**TOPK)},
    "passes": lambda: {"backward_passes_per_step": 2},
}


def known_gradients(method, late, change=None, compiled=True):
    """The weights after each step and at the end, and what the rank keeps of the inner reducer."""
    variables = synthetic_steps.make_variables(SHAPES)
    options = REDUCERS[method]()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), **options,
                                         **({"overlap": hvd.DelayedUpdate(0.0)} if late else {}))

    def changed(step, gradients):
        if change == "nan" and step == 2 and hvd.rank() == 1:
            gradients[2] = gradients[2] * np.nan
        return gradients

    seen = [synthetic_steps.flat(variables), *synthetic_steps.run_steps(
        optimizer, variables, hvd.rank(), 5, compiled=compiled, change=changed,
        passes=options.get("backward_passes_per_step", 1))]
    optimizer.flush()
    hvd.assert_replicas_equal(variables, optimizer=optimizer)
    seen.append(synthetic_steps.flat(variables))
    reducer = optimizer._hvd_ext.reducer
    inner = reducer.inner if late else reducer
    return seen, [np.array(one) for one in inner.per_rank_state()]


def late_and_not(cases):
    return {case: [known_gradients(*case[:1], late, *case[1:]) for late in (True, False)] for case in cases}


@pytest.mark.distributed
def test_every_reducer_is_itself_one_step_late(ranks):
    cases = [("passes",), ("topk", "nan"), ("plain", None, False)]  # the others are in tests/conformance
    for found in ranks(2, init="tensorflow").run(late_and_not, cases, timeout=300):
        for case, ((late, left), (synchronous, same)) in found.items():
            np.testing.assert_array_equal(late[0], late[1], err_msg=str(case))
            np.testing.assert_array_equal(late[1:], synchronous[:-1], err_msg=str(case))
            for mine, other in zip(left, same, strict=True):
                np.testing.assert_array_equal(mine, other, err_msg=str(case))


# The exchange waits for nothing of its step


def what_an_exchange_waits_for():
    """Whether the graph has its exchange depend on a gradient of this step: with overlap= and without."""
    found = []
    for late in (hvd.DelayedUpdate(), None):
        variables = synthetic_steps.make_variables(SHAPES)
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), overlap=late)

        @tf.function
        def step(*gradients, optimizer=optimizer, variables=variables):
            optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))

        graph = step.get_concrete_function(*(tf.TensorSpec(v.shape, v.dtype) for v in variables)).graph
        exchanges = [operation for operation in graph.get_operations() if reduces(operation, graph)]
        assert exchanges
        given = {graph.inputs[number].op.name for number in range(len(SHAPES))}
        found.append(bool(given & set().union(*(ancestors(one) for one in exchanges))))
    return found


def reduces(operation, graph):
    """Whether gradients are allreduced in the operation, or in a branch of it."""
    if operation.type == "HorovodAllreduce":
        return operation.get_attr("reduce_op") != 5 and "agree" not in operation.name
    names = [operation.get_attr(branch).name for branch in ("then_branch", "else_branch")
             if branch in operation.node_def.attr]
    return any(reduces(inner, graph) for name in names
               for inner in graph._get_function(name).graph.get_operations())


def ancestors(operation):
    seen, open_ones = set(), [operation]
    while open_ones:
        one = open_ones.pop()
        if one.name not in seen:
            seen.add(one.name)
            open_ones += [*(tensor.op for tensor in one.inputs), *one.control_inputs]
    return seen


@pytest.mark.distributed
def test_the_exchange_runs_beside_the_step(ranks):
    assert ranks(2, init="tensorflow").run(what_an_exchange_waits_for, timeout=150) == [[False, True]] * 2


# State


def fitted_and_disagreeing():
    """Weights after ``model.fit`` under mixed precision's optimizer; what ranks say that do not agree."""
    model = training.dense_model()
    inner = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), initial_scale=64.0)
    optimizer = hvd.DistributedOptimizer(inner, overlap=hvd.DelayedUpdate())
    training.fit(model, optimizer, hvd.rank(), hvd.size())
    optimizer.flush()
    hvd.assert_replicas_equal(model.variables)
    assert optimizer.report()["overlap"]["updates"] == 2 * training.STEPS
    weights = training.weights(model)
    if hvd.rank() == 1:
        optimizer.inner_optimizer._hvd_ext.reducer.waits.assign(1)
    said = []
    for other in (optimizer, hvd.DistributedOptimizer(keras.optimizers.SGD(0.1),
                                                      overlap=hvd.DelayedUpdate(1.0 + hvd.rank()))):
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            training.fit(training.dense_model() if other is not optimizer else model, other,
                         hvd.rank(), hvd.size())
        said.append(str(caught.value))
    return weights, said


@pytest.mark.distributed
def test_fit_and_ranks_that_disagree(ranks):
    found = ranks(2, init="tensorflow").run(fitted_and_disagreeing, timeout=150)
    for weights, (waits, differs) in found:
        assert all(np.isfinite(one).all() for one in weights)
        assert "flush()" in waits
        assert "overlap: lam=" in differs


# Alone


def sparse_rows(compiled):
    """Batches of several sizes through an embedding: a trace does not know how many rows."""
    model, by_hand = training.embedding_model(), training.embedding_model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), overlap=hvd.DelayedUpdate(0.0),
                                         sparse_as_dense=True)

    def gradients_of(model, size):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(tf.zeros((size, 5), tf.int32)) - tf.ones((size, 3))) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    def step(size):
        optimizer.apply(gradients_of(model, size), model.trainable_variables)

    run = tf.function(step, reduce_retracing=True) if compiled else step
    late = None
    for size in (4, 4, 3, 5):
        run(tf.constant(size))
        now = gradients_of(by_hand, size)
        if late is not None:
            keras.optimizers.SGD(0.1).apply(late, by_hand.trainable_variables)
        late = now
    hvd.assert_replicas_equal(model)
    np.testing.assert_allclose(synthetic_steps.flat(model.trainable_variables),
                               synthetic_steps.flat(by_hand.trainable_variables), rtol=1e-5, atol=1e-6)
    return True


@pytest.mark.distributed
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_sparse_gradients_of_batches_of_several_sizes(ranks, compiled):
    assert ranks(2, init="tensorflow").run(sparse_rows, compiled) == [True, True]


def refused():
    sgd = keras.optimizers.SGD
    with pytest.raises(TypeError, match=r"overlap must be hvd\.DelayedUpdate"):
        hvd.DistributedOptimizer(sgd(0.1), overlap=True)
    with pytest.raises(ValueError, match="backward_passes_per_step"):
        hvd.DistributedOptimizer(sgd(0.1, gradient_accumulation_steps=2), overlap=hvd.DelayedUpdate())
    with pytest.raises(ValueError, match='virtual_workers="rank"'):
        hvd.DistributedOptimizer(sgd(0.1), overlap=hvd.DelayedUpdate(), backward_passes_per_step=2,
                                 op=hvd.DelayCompensated(virtual_workers="microbatch"))
    model = training.dense_model()
    with pytest.raises(ValueError, match="drop one of them"):
        hvd.DistributedOptimizer(sgd(0.1), overlap=hvd.DelayedUpdate(),
                                 preconditioner=hvd.SENG(model, damping=0.1))
    optimizer = hvd.DistributedOptimizer(sgd(0.1), overlap=hvd.DelayedUpdate())
    with pytest.raises(ValueError, match="drop one of them"):
        optimizer.register_local_var(model.trainable_variables[0])
    with pytest.raises(ValueError, match="drop overlap="):
        hvd.uneven_inputs(optimizer)
    embedding = training.embedding_model()
    embedding.compile(optimizer, "mse", run_eagerly=True)
    with pytest.raises(ValueError, match="sparse_as_dense=True"):
        embedding.train_on_batch(np.zeros((4, 5), "int32"), np.zeros((4, 3), "float32"))


@pytest.mark.distributed
def test_what_cannot_be_combined(ranks):
    ranks(1, init="tensorflow").run(refused, timeout=150)


def flushed_without_late():
    variables = synthetic_steps.make_variables([(3,)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.flush()
    after = synthetic_steps.run_steps(optimizer, variables, 0, 1, compiled=False)[-1]
    optimizer.flush()
    np.testing.assert_array_equal(synthetic_steps.flat(variables), after)


@pytest.mark.distributed
def test_without_late_flush_does_nothing(ranks):
    ranks(1, init="tensorflow").run(flushed_without_late, timeout=150)

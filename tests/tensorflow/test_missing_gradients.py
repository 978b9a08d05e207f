"""Gradients that are missing: on one rank they count as zeros, on all ranks the variable is left out."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow as hvd  # noqa: E402

SHAPES = ((4, 3), (3,), (3, 2), (2,))
# By step: the (rank, variable) pairs without a gradient.
STEPS = ((), ((1, 0),), ((0, 1), (1, 1)), ((0, 0), (0, 1), (1, 2)), ((0, 2), (1, 2), (1, 3)), ())


def fresh():
    rng = np.random.default_rng(3)
    return [keras.Variable(rng.standard_normal(shape).astype("float32"), name=f"v{number}")
            for number, shape in enumerate(SHAPES)]


def gradients_of(step, rank):
    rng = np.random.default_rng([step, rank])
    found = [rng.standard_normal(shape).astype("float32") for shape in SHAPES]
    return [None if (rank, number) in STEPS[step] else one for number, one in enumerate(found)]


def optimizer(**options):
    return keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1, **options)


def mean_over_ranks(by_rank):
    """None where every rank's is."""
    return None if all(one is None for one in by_rank) else sum(
        0 if one is None else one for one in by_rank) / len(by_rank)


def reference(passes=1, mean=False):
    variables, plain, sums = fresh(), optimizer(), [None] * len(SHAPES)
    for step in range(len(STEPS)):
        means = [mean_over_ranks(pair) for pair in zip(*(gradients_of(step, r) for r in (0, 1)), strict=True)]
        sums = [one if other is None else other if one is None else one + other
                for one, other in zip(sums, means, strict=True)]
        if step % passes == passes - 1:
            divisor = passes if mean else 1
            plain.apply([None if one is None else tf.constant(one / divisor) for one in sums], variables)
            sums = [None] * len(SHAPES)
    return [np.array(one) for one in variables]


def steps_on_ranks(compiled, options, accumulation=None):
    variables = fresh()
    wrapped = hvd.DistributedOptimizer(optimizer(gradient_accumulation_steps=accumulation), **options)
    for step in range(len(STEPS)):
        found = gradients_of(step, hvd.rank())
        present = [number for number, one in enumerate(found) if one is not None]

        def apply(given, present=present):
            by_number = dict(zip(present, given, strict=True))
            wrapped.apply([by_number.get(number) for number in range(len(SHAPES))], variables)

        (tf.function(apply) if compiled else apply)([tf.constant(found[number]) for number in present])
    return [np.array(one) for one in variables]


WAYS = {
    "plain": ({}, 1), "groups": ({"groups": 2, "server": "rank0"}, 1), "sharded": ({"server": "sharded"}, 1),
    "passes": ({"backward_passes_per_step": 2}, 2),
}


@pytest.mark.distributed
@pytest.mark.parametrize("compiled", [False, True])
def test_missing_gradients_equal_one_process(ranks, compiled):
    pool = ranks(2, init="tensorflow")
    for way, (options, passes) in WAYS.items():
        first, second = pool.run(steps_on_ranks, compiled, options)
        for mine, other, one in zip(first, second, reference(passes), strict=True):
            np.testing.assert_array_equal(mine, other, err_msg=way)
            np.testing.assert_allclose(mine, one, rtol=1e-5, atol=1e-6, err_msg=way)


@pytest.mark.distributed
@pytest.mark.parametrize("compiled", [False, True])
def test_missing_in_a_pass_that_keras_accumulates(ranks, compiled):
    first, second = ranks(2, init="tensorflow").run(steps_on_ranks, compiled, {}, 2)
    for mine, other, one in zip(first, second, reference(2, mean=True), strict=True):
        np.testing.assert_array_equal(mine, other)
        np.testing.assert_allclose(mine, one, rtol=1e-5, atol=1e-6)


def tape_on_ranks(compiled, missing):
    """Gradients of two variables; each rank's loss leaves out what ``missing`` says."""
    a, b = tf.Variable([1.0, 2.0]), tf.Variable(3.0)
    kinds = []

    def step():
        with tf.GradientTape() as tape:
            loss = tf.constant(0.0)
            for number, variable in enumerate((a, b)):
                if (hvd.rank(), number) not in missing:
                    loss += (1.0 + hvd.rank()) * tf.reduce_sum(variable * variable)
        found = hvd.DistributedGradientTape(tape).gradient(loss, [a, b])
        kinds.append([one is None for one in found])
        return [tf.zeros(()) if one is None else one for one in found]

    found = [one.numpy().tolist() for one in (tf.function(step) if compiled else step)()]
    return found, kinds[-1]


@pytest.mark.distributed
def test_tape_with_missing_gradients(ranks):
    pool = ranks(2, init="tensorflow")
    for compiled in (False, True):
        for found, none in pool.run(tape_on_ranks, compiled, [(1, 0)]):
            assert (found, none) == ([[1.0, 2.0], 9.0], [False, False])
        for found, none in pool.run(tape_on_ranks, compiled, [(0, 0), (1, 0), (0, 1)]):
            assert none == [not compiled, False]  # a graph is made before that is known
            assert found == [[0.0, 0.0] if compiled else 0.0, 6.0]


def kinds_that_differ(compiled, options):
    """What the ranks say where one has IndexedSlices, and the other nothing."""
    table, bias = keras.Variable(np.ones((4, 2), "float32")), keras.Variable(np.ones(2, "float32"))
    wrapped = hvd.DistributedOptimizer(optimizer(), **options)

    def apply(places):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(bias * bias)
            if hvd.rank() == 0:
                loss += tf.reduce_sum(tf.gather(table.value, places) ** 2)
        wrapped.apply(tape.gradient(loss, [table.value, bias.value]), [table, bias])

    try:
        (tf.function(apply) if compiled else apply)(tf.constant([1, 3]))
    except tf.errors.InvalidArgumentError as error:
        return str(error)
    return np.array(table).tolist()


@pytest.mark.distributed
@pytest.mark.parametrize("compiled", [False, True])
def test_missing_indexed_slices(ranks, compiled):
    for found in ranks(2, init="tensorflow").run(kinds_that_differ, compiled, {}):
        assert "pass sparse_as_dense=True" in found
    first, second = ranks(2, init="tensorflow").run(kinds_that_differ, compiled, {"sparse_as_dense": True})
    assert first == second != np.ones((4, 2)).tolist()


def nothing_at_all():
    wrapped, variables = hvd.DistributedOptimizer(optimizer()), fresh()
    try:
        wrapped.apply([None] * len(variables), variables)
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_no_gradient_on_any_rank_is_an_error(ranks):
    for found in ranks(2, init="tensorflow").run(nothing_at_all):
        assert "no gradients provided for any variable" in found.lower()
    with pytest.raises(ValueError, match="No gradients provided"):
        optimizer().apply([None] * len(SHAPES), fresh())


def one_process():
    wrapped, variables = hvd.DistributedOptimizer(optimizer()), fresh()
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        wrapped.apply([None, *(tf.ones(shape) for shape in SHAPES[1:])], variables)
    return [np.array(one) for one in variables]


@pytest.mark.distributed
def test_one_process_leaves_out_as_keras_does(ranks):
    [found] = ranks(1, init="tensorflow").run(one_process)
    np.testing.assert_array_equal(found[0], np.array(fresh()[0]))
    assert np.abs(found[1] - np.array(fresh()[1])).max() > 0

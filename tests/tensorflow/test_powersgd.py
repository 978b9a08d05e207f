"""PowerSGD under TensorFlow against the float64 oracle: replicas, bytes, bad gradients, checkpoints."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from hvd_ext.reducers.buckets import BucketKey, TensorSpec, plan_buckets  # noqa: E402
from hvd_ext.reducers.powersgd import first_q, plan_matrices  # noqa: E402
from tests.reference.powersgd import powersgd  # noqa: E402

SHAPES = [(12, 9), (5,), (3, 4, 10), (20, 21)]
COMPRESSED = [0, 2, 3]
CASES = [{}, {"rank": 1}, {"warm_start": False}, {"error_feedback": False},
         {"rank": 3, "min_compression": 1.0}]


def made_gradients(rank, step, dtype="float64"):
    rng = np.random.default_rng([rank, step])
    return [(rng.standard_normal(shape) * (0.3 + rng.random())).astype(dtype) for shape in SHAPES]


def build(settings, dtype="float64"):
    hvd.init()
    variables = [keras.Variable(np.ones(shape), dtype=dtype) for shape in SHAPES]
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(1.0), compression=hvd.Compression.powersgd(**{"rank": 2, **settings}))
    return variables, optimizer


def train(variables, optimizer, steps, *, compiled=True, poison=None):
    """What each step took from the variables: the reduced gradients, as the learning rate is 1."""
    @tf.function(jit_compile=False, autograph=False)
    def graph(gradients):
        optimizer.apply(gradients, variables)

    applied = []
    for step in steps:
        before = [variable.numpy() for variable in variables]
        gradients = made_gradients(hvd.rank(), step, variables[0].dtype)
        if poison == step and hvd.rank() == 1:
            gradients[2].flat[1] = np.nan
        optimizer.build(variables)
        (graph if compiled else lambda g: optimizer.apply(g, variables))(
            [tf.constant(g) for g in gradients])
        applied.append([b - v.numpy() for b, v in zip(before, variables, strict=True)])
    return applied


def oracle(ranks, steps, settings):
    specs = [TensorSpec("", shape, 8, BucketKey("float64", route="powersgd" if k in COMPRESSED else "dense"))
             for k, shape in enumerate(SHAPES)]
    expected = {}
    for bucket in plan_buckets(specs):
        if bucket.kind.route == "dense":
            continue
        found = plan_matrices(bucket, specs, settings.get("rank", 2), output_axis=-1)
        for one in found:
            def first(step, one=one, found=found, index=bucket.index):
                return one.q.slice_of(first_q(found, (0, index, step))).reshape(one.m, one.r)

            def gradient(rank, step, one=one):
                return made_gradients(rank, step)[one.slot.index].reshape(one.n, one.m)

            expected[one.slot.index] = powersgd(
                gradient, first, ranks=ranks, steps=steps,
                feedback=settings.get("error_feedback", True),
                warm_start=settings.get("warm_start", True))[0]
    return expected


def every_case(cases, steps, compiled):
    results = []
    for settings in cases:
        variables, optimizer = build(settings)
        results.append((train(variables, optimizer, range(steps), compiled=compiled),
                        [variable.numpy().tobytes() for variable in variables]))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "compiled"), [(2, True), (2, False), (4, True)])
def test_five_steps_are_the_oracles(ranks, size, compiled):
    cases = CASES if size == 2 else CASES[:1]
    by_rank = ranks(size, init="tensorflow").run(every_case, cases, 5, compiled, timeout=240)
    for number, settings in enumerate(cases):
        expected = oracle(size, 5, settings)
        assert len({tuple(result[number][1]) for result in by_rank}) == 1
        applied = by_rank[0][number][0]
        for index, means in expected.items():
            for step, mean in enumerate(means):
                np.testing.assert_allclose(applied[step][index].reshape(mean.shape), mean, rtol=1e-9,
                                           atol=1e-9)
        whole = np.mean([made_gradients(rank, 4)[1] for rank in range(size)], axis=0)
        np.testing.assert_allclose(applied[-1][1], whole, rtol=1e-9)


def bad_gradient():
    variables, optimizer = build({})
    seen = []
    for step in range(4):
        optimizer.build(variables)
        state = [v.numpy().tobytes() for v in optimizer.variables if "residual" in v.path or "q_" in v.path]
        applied, = train(variables, optimizer, [step], compiled=False, poison=2)
        after = [v.numpy().tobytes() for v in optimizer.variables if "residual" in v.path or "q_" in v.path]
        seen.append((not any(np.any(one) for one in applied), state == after))
    report = optimizer.report()
    return seen, report["steps"], report["skipped_steps"], report["sent"]


@pytest.mark.distributed
def test_a_bad_gradient_on_one_rank_is_skipped_by_all_and_bytes_are_the_factors(ranks):
    numbers = 2 * ((12 + 9) + (12 + 10) + (20 + 21))
    for seen, steps, skipped, sent in ranks(2, init="tensorflow").run(bad_gradient):
        assert seen == [(False, False), (False, False), (True, True), (False, False)]
        assert (steps, skipped) == (3, 1)
        assert sent["factors"] == 8 * numbers  # 2 (M-1)/M of P and Q
        assert sent["dense"] == 8 * 5


def resume():
    variables, optimizer = build({})
    train(variables, optimizer, range(3))
    weights = [variable.numpy() for variable in variables]
    store = {}
    optimizer.save_own_variables(store)
    train(variables, optimizer, range(3, 6))
    again, other = build({})
    for variable, value in zip(again, weights, strict=True):
        variable.assign(value)
    other.build(again)
    other.load_own_variables(store)
    train(again, other, range(3, 6))
    return [v.numpy().tobytes() for v in variables] == [v.numpy().tobytes() for v in again]


@pytest.mark.distributed
def test_a_checkpoint_continues_bit_for_bit(ranks):
    assert ranks(2, init="tensorflow").run(resume) == [True, True]

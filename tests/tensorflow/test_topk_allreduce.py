"""TopK by sparse allreduce under TensorFlow: the oracle, PyTorch's arithmetic, replicas, skipped steps."""

from __future__ import annotations

import os

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")
pytest.importorskip("torch", reason="the shared problems need PyTorch")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from hvd_ext.reducers.topk import keep_count  # noqa: E402
from tests.problems import worker_gradients  # noqa: E402
from tests.reference.sparse_allreduce import SparseAllreduce  # noqa: E402
from tests.tensorflow import synthetic_steps, training  # noqa: E402

pytestmark = pytest.mark.distributed

SHAPES = [(60, 50), (37,), (11, 13, 7)]
NUMEL = 60 * 50 + 37 + 11 * 13 * 7
RATIO = 0.05
LR = 0.125  # a power of two, so that the reduced gradient can be read off the weights


def build(**settings):
    variables = synthetic_steps.make_variables(SHAPES)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(LR), compression=hvd.Compression.topk(
        **{"ratio": RATIO, "min_size": 0, "exchange": "sparse_allreduce", **settings}))
    return variables, optimizer


def gradients_of(worker, step):
    made_gradients = worker_gradients(SHAPES, worker=worker, step=step)
    return [g.astype(np.float32) * np.float32(6.0 if i == 2 else 1.0) for i, g in enumerate(made_gradients)]


def in_bucket_order(arrays):
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in reversed(arrays)])


def against_the_oracle(steps, compiled):
    variables, optimizer = build()
    seen = []

    def apply(*gradients):
        reduced, good = reducer()(list(gradients), variables)
        return reduced, good

    def reducer():
        return optimizer._hvd_ext.reducer

    optimizer.build(variables)
    run = tf.function(apply) if compiled else apply
    oracle, k = SparseAllreduce(hvd.size(), NUMEL), keep_count(NUMEL, RATIO)
    worst, counts, moves = 0.0, [], 0
    even = [int(b) for b in np.cumsum([0, *[len(p) for p in np.array_split(np.zeros(NUMEL), hvd.size())]])]
    before = even
    for step in range(steps):
        reduced, good = run(*[tf.constant(g) for g in gradients_of(hvd.rank(), step)])
        assert bool(good)
        got = in_bucket_order([g.numpy() for g in reduced])
        means = oracle.finish_exchange([in_bucket_order(gradients_of(w, step)) for w in range(hvd.size())], k)
        places = np.flatnonzero(got)
        others = np.delete(np.abs(means), places)
        assert others.max() <= np.abs(means[places]).min() * (1 + 1e-6)
        worst = max(worst, float(np.abs(oracle.apply(means, places) - got).max()))
        counts.append(len(places))
        after = reducer().sparse.owned[0].bounds.numpy().tolist()
        if after != before:
            moves += 1
            oracle.fold(before)
        before = after
        worst = max(worst, float(np.abs(reducer().residual[0].numpy() - oracle.e[hvd.rank()]).max()))
        low, high = after[hvd.rank()], after[hvd.rank() + 1]
        owned = reducer().sparse.owned[0].residual.numpy()
        worst = max(worst, float(np.abs(owned[low:high] - oracle.o[low:high]).max()))
        seen.append(got.astype(np.float32).tobytes())
    assert np.abs(oracle.mass()).max() < 1e-9
    return worst, counts, moves, seen, optimizer.report()


@pytest.mark.parametrize("size", [2])
def test_equals_the_oracle(ranks, size):
    k = keep_count(NUMEL, RATIO)
    for compiled in (True, False):
        results = ranks(size, init="tensorflow").run(against_the_oracle, 16, compiled, timeout=150)
        for worst, counts, moves, seen, report in results:
            assert worst < 2e-5
            assert np.mean(counts) == pytest.approx(k, rel=0.05)
            assert moves >= 1
            assert seen == results[0][3]
            assert report["applied_entries"] == counts[-1]
            assert report["sent"]["values"] > 0


def options_and_skips():
    found = []
    for settings in ({"values": "float16"}, {"values": "bfloat16", "bucket_bytes": 4000},
                     {"ratio": _falling, "per_tensor": True}, {"error_feedback": False},
                     {"exchange": "auto"}):
        variables, optimizer = build(**settings)
        synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 3, compiled=True)

        def poison(step, gradients):
            return [g * np.nan for g in gradients] if hvd.rank() == 1 else gradients

        state = [v.numpy().copy() for v in optimizer._hvd_ext.reducer.per_rank_state()]
        weights = synthetic_steps.flat(variables)
        synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 1, compiled=True, first=3, change=poison)
        assert np.array_equal(weights, synthetic_steps.flat(variables))
        assert all(np.array_equal(a, b.numpy()) for a, b in
                   zip(state, optimizer._hvd_ext.reducer.per_rank_state(), strict=True))
        synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 2, compiled=True, first=4)
        assert np.isfinite(synthetic_steps.flat(variables)).all()
        found.append(synthetic_steps.flat(variables).tobytes())
    return found


def _falling(step):
    return 0.02 + 0.1 / (step + 1)


def test_replicas_hold_the_same_bits_and_skip_alike(ranks):
    first, second = ranks(2, init="tensorflow").run(options_and_skips, timeout=200)
    assert first == second
    assert len(set(first)) == len(first)


def refusals():
    """What the sparse allreduce says to frozen layers, sparse gradients and Horovod elastic."""
    def optimizer():
        return hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=hvd.Compression.topk(
            0.3, min_size=0, exchange="sparse_allreduce"))

    model, frozen, said = training.dense_model(), optimizer(), []
    weights = model.trainable_variables
    frozen.apply([tf.ones_like(one) for one in weights], weights)
    with pytest.raises(NotImplementedError) as caught:
        frozen.apply([tf.ones_like(one) for one in weights[2:]], weights[2:])
    said.append(str(caught.value))
    table = training.embedding_model()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(table(tf.zeros((2, 5), tf.int32)))
    with pytest.raises(ValueError, match="sparse_as_dense") as refused:
        optimizer().apply(tape.gradient(loss, table.trainable_variables), table.trainable_variables)
    said.append(str(refused.value))
    os.environ["HOROVOD_ELASTIC"] = "1"
    try:
        with pytest.raises(NotImplementedError) as caught:
            optimizer().build(weights)
    finally:
        del os.environ["HOROVOD_ELASTIC"]
    return [*said, str(caught.value)]


def test_what_it_cannot_do_is_an_error_that_names_the_way(ranks):
    for frozen, table, elastic in ranks(2, init="tensorflow").run(refusals):
        assert "use exchange='allgather' where layers are frozen" in frozen
        assert "pass sparse_as_dense=True" in table
        assert "use exchange='allgather' with Horovod elastic" in elastic

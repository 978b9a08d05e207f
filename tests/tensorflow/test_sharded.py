"""``server="sharded"`` with plain reduction: gradients to their owners, weights back."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.problems import worker_gradients  # noqa: E402
from tests.tensorflow import made, training  # noqa: E402

pytestmark = pytest.mark.ranks

SHAPES = [(40, 30), (7,), (8, 5, 3), (), (0, 3), (300,), (2, 300)]
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "adamw": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1),
    "clipped": lambda: keras.optimizers.Adam(0.05, clipnorm=0.5),
    "clipped together": lambda: keras.optimizers.Adam(0.05, global_clipnorm=0.5),
    "accumulated": lambda: keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2,
                                                global_clipnorm=5.0),
    "averages": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
    "amsgrad": lambda: hvd.AMSGrad(0.05),
    "muon": lambda: keras.optimizers.Muon(0.01),
}
# Their updates take sums over many elements, whose bits hang on where the elements lie in memory.
SUMMED = ("clipped", "clipped together", "accumulated", "muon")
WAYS = {
    "sum": {"op": hvd.Sum}, "grouped": {"groups": 2}, "passes": {"backward_passes_per_step": 3},
    "in half": {"compression": hvd.Compression.fp16}, "topk": {"compression": hvd.Compression.topk(0.2)},
}


def run(make, server, *, compiled=True, steps=4, shapes=SHAPES, passes=1, change=None, **options):
    variables = made.make_variables(shapes)
    if isinstance(make(), keras.optimizers.Muon):  # asks for the variables' paths
        variables = [keras.Variable(one.numpy(), name=f"p{n}") for n, one in enumerate(variables)]
    optimizer = hvd.DistributedOptimizer(make(), server=server, **options)
    made.run_steps(optimizer, variables, hvd.rank(), steps, compiled=compiled, passes=passes, change=change)
    hvd.assert_replicas_equal(variables, optimizer=optimizer)
    return made.flat(variables), optimizer


def trajectories(names, ways):
    found = {}
    for server in ("replicated", "sharded"):
        for name in names:
            for compiled in (True, False) if name == "sgd" else (True,):
                # Keras itself cannot add tensors that are empty.
                shapes = [shape for shape in SHAPES if name not in ("averages", "muon") or 0 not in shape]
                weights, optimizer = run(OPTIMIZERS[name], server, compiled=compiled, shapes=shapes)
                found[name, server, compiled] = weights, optimizer.report()
        for name in ways:
            weights, optimizer = run(OPTIMIZERS["adamw"], server, passes=3 if name == "passes" else 1,
                                     **WAYS[name])
            found[name, server, True] = weights, optimizer.report()
    return found


@pytest.mark.parametrize(("size", "names", "ways"), [(2, tuple(OPTIMIZERS), tuple(WAYS)),
                                                     (3, ("sgd", "clipped together"), ("in half",))])
def test_trajectory_is_that_of_every_rank_updating_all(ranks, size, names, ways):
    by_rank = ranks(size, init="tensorflow").run(trajectories, names, ways, timeout=300)
    for name, server, compiled in by_rank[0]:
        if server != "sharded":
            continue
        for found in by_rank:
            mine, plain = found[name, server, compiled][0], found[name, "replicated", compiled][0]
            np.testing.assert_array_equal(mine, by_rank[0][name, server, compiled][0])
            if name == "in half":  # rounded once after the mean, not at every addition
                np.testing.assert_allclose(mine, plain, atol=5e-2)
            elif size == 2 and name not in SUMMED:
                np.testing.assert_array_equal(mine, plain, err_msg=name)
            else:
                np.testing.assert_allclose(mine, plain, rtol=1e-5, atol=1e-6)
            sent = found[name, server, compiled][1].get("sent_to_owners")
            assert sent == (None if name == "topk" else 6)  # all but the empty one


def against_oracle(half):
    """SGD steps against the mean of the ranks' gradients in float64; the largest difference."""
    shapes = [(50, 4), (9,), (3, 3)]
    variables = made.make_variables(shapes)
    oracle = [one.numpy().astype(np.float64) for one in variables]
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.1), server="sharded",
        compression=hvd.Compression.fp16 if half else hvd.Compression.none)
    made.run_steps(optimizer, variables, hvd.rank(), 3, compiled=True)
    for step in range(3):
        for number, weights in enumerate(oracle):
            each = [worker_gradients(shapes, worker=rank, step=step)[number] for rank in range(hvd.size())]
            each = [np.float32(g) for g in each]
            weights -= 0.1 * np.mean([np.float16(g).astype(float) if half else g.astype(float)
                                      for g in each], axis=0)
    return max(np.abs(one.numpy() - w).max() for one, w in zip(variables, oracle, strict=True))


def test_against_float64(ranks):
    assert max(ranks(2, init="tensorflow").run(against_oracle, False)) < 1e-6
    # Each step rounds the mean to half precision once: gradients of about 1 to 2^-11, times lr and steps.
    assert max(ranks(2, init="tensorflow").run(against_oracle, True)) < 3 * 0.1 * 4 * 2.0**-11


def joined(names, tokens):
    """Weights after ``model.fit`` of models whose gradients are sparse, or clipped together."""
    found = {}
    for name in names:
        optimizer = hvd.DistributedOptimizer(training.OPTIMIZERS[name](), server="sharded")
        model = training.embedding_model() if tokens else training.dense_model()
        training.fit(model, optimizer, hvd.rank(), hvd.size(), tokens=tokens)
        hvd.assert_replicas_equal(model, optimizer=optimizer)
        found[name] = training.weights(model), optimizer.report()["sent_to_owners"]
    return found


@pytest.mark.parametrize("tokens", [False, True])
def test_fit_is_that_of_one_process_on_the_joined_batch(ranks, tokens):
    names = ("momentum",) if tokens else ("global_clipnorm", "accumulation", "weight_decay")
    for found in ranks(2, init="tensorflow").run(joined, names, tokens, timeout=200):
        for name in names:
            model = training.embedding_model() if tokens else training.dense_model()
            training.fit_joined(model, training.OPTIMIZERS[name](), 2, tokens=tokens)
            for mine, one in zip(found[name][0], training.weights(model), strict=True):
                np.testing.assert_allclose(mine, one, rtol=1e-5, atol=1e-5)
            assert found[name][1] == (2 if tokens else 4)  # an embedding's rows are gathered


def bytes_of(server, clipnorm=None):
    _, optimizer = run(lambda: keras.optimizers.Adam(0.1, global_clipnorm=clipnorm), server, steps=2,
                       shapes=[(300, 100), (100,), (100, 50), (50,), (20, 50, 3, 3)])
    report = optimizer.report()
    return sum(report["sent"].values()), sum(report["received"].values())


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_are_those_of_an_allreduce(ranks, size):
    dense = ranks(size, init="tensorflow").run(bytes_of, "replicated")
    for clipnorm in (None, 1.0):
        sharded = ranks(size, init="tensorflow").run(bytes_of, "sharded", clipnorm)
        for way in (0, 1):  # a rank sends more than another where its share is smaller
            assert sum(one[way] for one in sharded) <= 1.02 * sum(one[way] for one in dense)


def with_missing_gradients(server):
    """In step 1 a variable has no gradient, on any rank; in step 2 one rank's holds a NaN."""
    variables = made.make_variables([(40, 30), (7,), (5, 5)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.1), server=server)
    bad = []
    for step in range(3):
        gradients = [tf.constant(g, tf.float32) for g in worker_gradients(
            [tuple(v.shape) for v in variables], worker=hvd.rank(), step=step)]
        if step == 1:
            gradients[1] = None
        if step == 2 and hvd.rank() == 1:
            gradients[2] = gradients[2] * np.nan
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        bad.append([bool(tf.reduce_any(tf.math.is_nan(v))) for v in variables])
    return made.flat(variables[:2]), bad


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_missing_gradients_and_a_nan(ranks):
    plain, sharded = (ranks(2, init="tensorflow").run(with_missing_gradients, server)
                      for server in ("replicated", "sharded"))
    for one, other in zip(plain, sharded, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1] == other[1] == [[False] * 3, [False] * 3, [False, False, True]]


def muon():
    """How often this rank orthogonalises in a step, and what it owns."""
    calls = []

    class Counting(keras.optimizers.Muon):
        def zeropower_via_newtonschulz5(self, x, steps):
            calls.append(tuple(x.shape))
            return super().zeropower_via_newtonschulz5(x, steps)

    shapes = [(24, 16), (16, 40), (64, 64), (40, 16), (9000,)]
    found = {}
    for server in ("replicated", "sharded"):
        calls.clear()
        weights, _ = run(lambda: Counting(0.01), server, steps=1, shapes=shapes)
        found[server] = weights, list(calls)
    return found


def test_muon_orthogonalises_only_what_a_rank_owns(ranks):
    by_rank = ranks(2, init="tensorflow").run(muon)
    every = [(24, 16), (16, 40), (64, 64), (40, 16)]
    for found in by_rank:
        np.testing.assert_allclose(found["sharded"][0], found["replicated"][0], rtol=1e-5, atol=1e-6)
        assert found["replicated"][1] == every
    shared = [found["sharded"][1] for found in by_rank]
    assert sorted(shared[0] + shared[1]) == sorted(every)
    assert [(64, 64)] in shared  # balanced by the cost of it, not by elements: the vector has the most

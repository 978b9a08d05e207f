"""``server="sharded"`` with plain reduction: gradients to their owners, weights back."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.problems import worker_gradients  # noqa: E402
from tests.tensorflow import synthetic_steps, training  # noqa: E402

pytestmark = pytest.mark.distributed

SHAPES = [(40, 32), (7,), (8, 5, 3), (), (0, 3), (300,), (2, 300)]
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
    variables = synthetic_steps.make_variables(shapes)
    if isinstance(make(), keras.optimizers.Muon):  # asks for the variables' paths
        variables = [keras.Variable(one.numpy(), name=f"p{n}") for n, one in enumerate(variables)]
    optimizer = hvd.DistributedOptimizer(make(), server=server, **options)
    synthetic_steps.run_steps(optimizer, variables, hvd.rank(), steps, compiled=compiled, passes=passes,
                              change=change)
    hvd.assert_replicas_equal(variables, optimizer=optimizer)
    return synthetic_steps.flat(variables), optimizer


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
    variables = synthetic_steps.make_variables(shapes)
    oracle = [one.numpy().astype(np.float64) for one in variables]
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.1), server="sharded",
        compression=hvd.Compression.fp16 if half else hvd.Compression.none)
    synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 3, compiled=True)
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
            ratio = sum(one[way] for one in sharded) / sum(one[way] for one in dense)
            assert 0.99 <= ratio <= 1.02


def with_missing_gradients(server):
    """In step 1 a variable has no gradient, on any rank; in step 2 one rank's holds a NaN."""
    variables = synthetic_steps.make_variables([(40, 30), (7,), (5, 5)])
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
    return synthetic_steps.flat(variables[:2]), bad


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
        # Without the small matrices on which the server tries whether an optimizer can be sharded.
        found[server] = weights, [shape for shape in calls if shape in shapes]
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


def wide_model(tokens=False):
    """Of variables that are larger than a rank's share."""
    keras.utils.set_random_seed(7)
    first = [keras.layers.Embedding(60, 128), keras.layers.Flatten()] if tokens else [
        keras.layers.Dense(40, activation="tanh"), keras.layers.Dense(128, activation="tanh")]
    return keras.Sequential([keras.Input((5,), dtype="int32" if tokens else "float32"), *first,
                             keras.layers.Dense(3)])


def pieces(name, tokens, **options):
    """Weights after ``model.fit``, the shapes of what this rank keeps, and the server's report."""
    optimizer = hvd.DistributedOptimizer(CUT[name](), server="sharded", **options)
    model = training.fit(wide_model(tokens), optimizer, hvd.rank(), hvd.size(), tokens=tokens)
    hvd.assert_replicas_equal(model, optimizer=optimizer)
    shapes = [tuple(v.shape) for v in optimizer.variables]
    return training.weights(model), shapes, optimizer.report()["server"]


CUT = {
    "adam": lambda: keras.optimizers.Adam(0.01), "nadam": lambda: keras.optimizers.Nadam(0.01),
    "lion": lambda: keras.optimizers.Lion(0.001), "ftrl": lambda: keras.optimizers.Ftrl(0.01),
    "adagrad": lambda: keras.optimizers.Adagrad(0.05), "adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.9, centered=True),
    "adamax": lambda: keras.optimizers.Adamax(0.01), "amsgrad": lambda: hvd.AMSGrad(0.01),
    "decayed": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.1),
}


def all_pieces(names, tokens):
    return {name: pieces(name, tokens) for name in names}


@pytest.mark.parametrize(("size", "names", "tokens"), [(2, tuple(CUT), False), (4, ("adam",), False),
                                                       (2, ("adam", "decayed"), True)])
def test_elementwise_optimizers_are_cut_by_element(ranks, size, names, tokens):
    by_rank = ranks(size, init="tensorflow").run(all_pieces, names, tokens, timeout=300)
    for name in names:
        model = wide_model(tokens)
        training.fit_joined(model, CUT[name](), size, tokens=tokens)
        for found in by_rank:
            for mine, one in zip(found[name][0], training.weights(model), strict=True):
                # Lion takes signs, of which one at rounding is as good as the other.
                np.testing.assert_allclose(mine, one, rtol=1e-4, atol=2e-3 if name == "lion" else 2e-5)
        shares = [found[name][2]["owned_elements"] for found in by_rank]
        assert sum(shares) == by_rank[0][name][2]["elements"]
        assert max(shares) - min(shares) <= 2 * 128  # matrices are cut between rows, here of 128
        cut = [{shape[0] for shape in found[name][1] if shape[1:] == (128,)} for found in by_rank]
        assert all(rows and max(rows) < (60 if tokens else 40) for rows in cut)


def whole_where_it_must_be():
    """The shapes of state where averages, a norm of each weight or replies need whole variables."""
    made_of = {"averages": (lambda: keras.optimizers.Adam(0.01, use_ema=True), {}),
               "clipped": (lambda: keras.optimizers.Adam(0.01, clipnorm=1.0), {}),
               "muon": (lambda: keras.optimizers.Muon(0.01), {}),
               "reply": (lambda: keras.optimizers.Adam(0.01), {"server": hvd.Server(
                   "sharded", downlink=hvd.Compression.fp16)})}
    found = {}
    for name, (make, options) in made_of.items():
        optimizer = hvd.DistributedOptimizer(make(), **{"server": "sharded", **options})
        training.fit(wide_model(), optimizer, hvd.rank(), hvd.size(), epochs=1)
        found[name] = [tuple(v.shape) for v in optimizer.variables if len(v.shape)]
    return found


def test_what_needs_whole_variables_gets_them(ranks):
    whole = {(5, 40), (40,), (40, 128), (128,), (128, 3), (3,), (2,), (0,)}  # the stamp is of two numbers
    for found in ranks(2, init="tensorflow").run(whole_where_it_must_be, timeout=200):
        for name, shapes in found.items():
            assert set(shapes) <= whole, name
            assert any(len(shape) == 2 for shape in shapes), name


def save_pieces(folder):
    """Trained, saved in each way, and trained on."""
    optimizer = hvd.DistributedOptimizer(CUT["adam"](), server="sharded")
    model = training.fit(wide_model(), optimizer, hvd.rank(), hvd.size())
    hvd.save_model(model, f"{folder}/model.keras")
    model.save(f"{folder}/own{hvd.rank()}.keras")
    hvd.save_checkpoint(f"{folder}/checkpoint", 1, model=model, optimizer=optimizer)
    training.fit(model, optimizer, hvd.rank(), hvd.size(), epochs=1)
    return training.weights(model)


def load_pieces(folder):
    found = {}
    for server in ("sharded", "replicated", "rank0"):
        model = hvd.load_model(f"{folder}/model.keras", server=server)
        training.fit(model, model.optimizer, hvd.rank(), hvd.size(), epochs=1)
        found["model", server] = training.weights(model)
        model = wide_model()
        optimizer = hvd.DistributedOptimizer(CUT["adam"](), server=server)
        optimizer.build(model.trainable_variables)
        loaded = hvd.load_checkpoint(f"{folder}/checkpoint", model=model, optimizer=optimizer,
                                     reset_per_rank_state=hvd.size() != 2)
        assert loaded.step == 1
        training.fit(model, optimizer, hvd.rank(), hvd.size(), epochs=1)
        found["checkpoint", server] = training.weights(model)
    if hvd.size() == 2:
        model = hvd.load_model(f"{folder}/own{hvd.rank()}.keras", server="sharded")
        training.fit(model, model.optimizer, hvd.rank(), hvd.size(), epochs=1)
        found["own", "sharded"] = training.weights(model)
    return found


def test_pieces_are_saved_and_come_back(ranks, tmp_path):
    straight = ranks(2, init="tensorflow").run(save_pieces, str(tmp_path))
    for found in ranks(2, init="tensorflow").run(load_pieces, str(tmp_path), timeout=200):
        for way, weights in found.items():
            for mine, one in zip(weights, straight[0], strict=True):
                np.testing.assert_array_equal(mine, one, err_msg=str(way))
    plain = keras.models.load_model(tmp_path / "model.keras")  # without this package
    training.fit_joined(plain, plain.optimizer, 4, epochs=1)
    for found in ranks(4, init="tensorflow").run(load_pieces, str(tmp_path), timeout=200):
        for weights in found.values():
            for mine, one in zip(weights, training.weights(plain), strict=True):
                np.testing.assert_allclose(mine, one, rtol=1e-5, atol=1e-5)

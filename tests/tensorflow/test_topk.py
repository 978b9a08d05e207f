"""``compression=hvd.Compression.topk`` and ``hvd.AMSGrad`` under TensorFlow, against Algorithm 1."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")
pytest.importorskip("torch", reason="the shared problems and the cross-checks need PyTorch")

import keras  # noqa: E402
import torch  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from hvd_ext.reducers.topk import Layout, TopK  # noqa: E402
from hvd_ext.reducers.topk.plan import Segment  # noqa: E402
from hvd_ext.tensorflow.reducers.kernels import topk as kernels  # noqa: E402
from tests.problems import worker_gradients  # noqa: E402
from tests.reference import spars_ams  # noqa: E402
from tests.tensorflow import synthetic_steps, training  # noqa: E402

SHAPES = [(37, 11), (50,), (9, 9)]
TOTAL = 37 * 11 + 50 + 81
KEEP = {"ratio": 0.05, "min_size": 0}


def torch_kernels():
    """PyTorch's kernels; Horovod serves one framework a process, so never on a TensorFlow rank."""
    from hvd_ext.torch.reducers.kernels import topk

    return topk


def vector(seed, n=5000, dtype=np.float32):
    rng = np.random.default_rng(seed)
    made_vector = rng.standard_normal(n).astype(dtype)
    made_vector[rng.integers(0, n, n // 5)] = 0
    made_vector[7] = made_vector[3] = 1.5  # ties
    return made_vector


def chosen(flat, segments, config, *, residual=None, seed=0):
    total = kernels.Total(tf.constant(flat), None if residual is None else tf.constant(residual))
    found = kernels.select_entries(total, segments, config, (seed,), tf.constant(9))
    if bool(found.finite):
        sums = flat if residual is None else flat + residual
        np.testing.assert_array_equal(found.exact.numpy(), sums[found.positions.numpy()])
    return found


@pytest.mark.parametrize("k", [1, 50, 4999])
def test_selection_is_pytorchs(k):
    flat, config = vector(k), TopK(0.01)
    segments = [Segment(0, 3000, k % 3000 or 1), Segment(3000, 2000, min(k, 2000))]
    ours = chosen(flat, segments, config).positions
    theirs = torch_kernels().select_entries(torch.from_numpy(flat), segments, config, (0,))
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def large_vectors(n):
    rng = np.random.default_rng(1)
    normal = rng.standard_normal(n).astype(np.float32)
    few = np.zeros(n, np.float32)
    few[rng.permutation(n)[:200]] = 1.0
    at_the_end = np.zeros(n, np.float32)
    at_the_end[-3:] = [1, -2, 3]
    return {"normal": normal, "float64": normal.astype(np.float64), "ties": np.round(normal, 1),
            "few": few, "at the end": at_the_end, "zero": np.zeros(n, np.float32),
            "heavy tail": normal**9, "one tensor large": np.sort(normal)}


@pytest.mark.parametrize("selection", ["exact", "sampled"])
@pytest.mark.parametrize("case", large_vectors(16))
def test_selection_of_a_large_bucket(case, selection):
    flat = large_vectors(300_005)[case]  # not a multiple of a block's length
    residual = np.random.default_rng(2).permutation(flat) if case in ("normal", "float64") else None
    sums = flat if residual is None else flat + residual
    k = 3000
    found = chosen(flat, [Segment(0, flat.size, k)], TopK(0.01, selection=selection),
                   residual=residual).positions.numpy()
    best = spars_ams_top(sums, k)
    best = best[sums[best] != 0]
    if selection == "exact" or len(best) < k:
        np.testing.assert_array_equal(found, best)
    else:
        assert 0.95 * k <= len(found) <= k
        assert set(found) <= set(best) or np.abs(sums[found]).min() >= np.abs(sums[best]).min()
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("place", [0, 15, 16, 150_003, 300_003, 300_004])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_wherever_it_is(place, bad):
    flat = large_vectors(300_005)["normal"]
    residual = np.zeros_like(flat)
    for spoilt in (flat, residual):
        kept, spoilt[place] = spoilt[place], bad
        found = chosen(flat, [Segment(0, flat.size, 3000)], TopK(0.01), residual=residual)
        assert not bool(found.finite)
        assert not len(found.positions)
        spoilt[place] = kept


def spars_ams_top(flat, k):
    return np.sort(np.lexsort((np.arange(flat.size), -np.abs(flat)))[:k])


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("k", [7, 8])
def test_messages_are_pytorchs_bit_for_bit(values, k):
    flat = vector(3, 200, np.float64 if values == "float64" else np.float32)
    flat[:3] = [1e30, -1e30, 65520.0]
    positions = spars_ams_top(flat, k)[:6]
    dtype, layout = getattr(torch, values), Layout(k, values)
    left = torch.from_numpy(flat.copy())
    sent = torch_kernels().split_selected(left, torch.from_numpy(positions), dtype)
    message = torch_kernels().pack_message(torch.from_numpy(positions), sent, layout)
    places = tf.constant(positions, tf.int32)
    ours, rounded = kernels.split_selected(tf.gather(tf.constant(flat), places), tf.as_dtype(values))
    words = kernels.pack_message(places, ours, layout)
    np.testing.assert_array_equal(words.numpy(), message.numpy())
    behind = [[0, 5]]  # what is padded is left out
    half = tf.constant(flat) / 2
    residual = kernels.new_residual(half, half, tf.pad(places, behind, constant_values=200),
                                    tf.pad(rounded, behind))
    np.testing.assert_array_equal(residual.numpy(), left.numpy())
    np.testing.assert_array_equal(  # e_new + s == a
        (residual + tf.scatter_nd(positions[:, None], tf.cast(ours, residual.dtype),
                                  residual.shape)).numpy(), flat)
    everyone = kernels.unpack_messages(tf.stack([words, words]), layout, tf.as_dtype(values))
    mean = kernels.mean_of(*everyone, 200, residual.dtype).numpy()
    expected = np.zeros(200, flat.dtype)
    expected[positions] = tf.cast(ours, residual.dtype).numpy()
    np.testing.assert_array_equal(mean, expected)


def oracle(ranks, steps):
    """The weights after so many steps of Algorithm 1."""
    # Buckets hold the last variable first; the oracle's order is the variables'.
    order = np.concatenate([np.arange(TOTAL - 81, TOTAL), np.arange(407, 457), np.arange(407)])

    def gradient(weights, worker, step):
        made = worker_gradients(SHAPES, worker=worker, step=step)
        return synthetic_steps.flat([g.astype("float32") for g in made])[order]

    start = synthetic_steps.flat(synthetic_steps.make_variables(SHAPES))[order]
    trajectory, _ = spars_ams.algorithm_1(gradient, start, workers=ranks, steps=steps, lr=0.01,
                                          keep=lambda n: max(1, round(KEEP["ratio"] * n)))
    return trajectory[-1][np.argsort(order)]


def test_amsgrad_is_pytorchs():
    from hvd_ext.torch.amsgrad import AMSGrad as TorchAMSGrad

    for options in ({}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}):
        ours = synthetic_steps.make_variables(SHAPES)
        theirs = [torch.nn.Parameter(torch.from_numpy(v.numpy())) for v in ours]
        reference = TorchAMSGrad(theirs, lr=0.01, betas=(0.8, 0.99), eps=1e-6, **options)
        optimizer = hvd.AMSGrad(0.01, betas=(0.8, 0.99), eps=1e-6, **options)
        for step, mine in enumerate(synthetic_steps.run_steps(optimizer, ours, 0, 5, compiled=True)):
            for parameter, g in zip(theirs, worker_gradients(SHAPES, worker=0, step=step),
                                    strict=True):
                parameter.grad = torch.from_numpy(g.astype("float32"))
            reference.step()
            np.testing.assert_allclose(mine, synthetic_steps.flat([p.detach() for p in theirs]), rtol=1e-5,
                                       atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_amsgrad_keeps_the_state_of_half_precision_in_float32(dtype):
    start = np.random.default_rng(0).standard_normal((7, 5))
    variable = keras.Variable(start, dtype=dtype)
    optimizer = hvd.AMSGrad(0.01)
    state = {name: np.zeros_like(start) for name in ("m", "v", "vhat")}
    for step in range(5):
        gradient = tf.cast(tf.fill(start.shape, 0.0 if step == 0 else 1e-4), dtype)  # squares underflow
        expected = spars_ams.amsgrad_step(
            tf.cast(variable.value, tf.float64).numpy(), tf.cast(gradient, tf.float64).numpy(), state,
            lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8)
        optimizer.apply([gradient], [variable])
        np.testing.assert_allclose(tf.cast(variable.value, tf.float64).numpy(), expected, atol=1e-3,
                                   rtol=2e-3 if dtype == "float16" else 2e-2)
    kinds = {keras.backend.standardize_dtype(v.dtype) for v in (*optimizer._moments, *optimizer._squares,
                                                                *optimizer._largest)}
    assert kinds == {"float32"}
    assert all("moment" in v.path or "square" in v.path
               for v in (*optimizer._moments, *optimizer._squares, *optimizer._largest))


def save_and_continue(folder):
    rank, size = hvd.rank(), hvd.size()
    options = {"compression": hvd.Compression.topk(0.1, min_size=10)}
    model = training.fit(training.dense_model(),
                         hvd.DistributedOptimizer(hvd.AMSGrad(0.01), **options), rank, size)
    hvd.assert_replicas_equal(model, optimizer=model.optimizer)
    residuals = model.optimizer._hvd_ext.reducer.per_rank_state()
    path = f"{folder}/model{rank}.keras"
    model.save(path)
    again = hvd.load_model(path, **options)
    loaded = again.optimizer._hvd_ext.reducer.per_rank_state()
    for mine, saved in zip(loaded, residuals, strict=True):
        np.testing.assert_array_equal(mine.numpy(), saved.numpy())
    for one in (model, again):
        training.fit(one, one.optimizer, rank, size, epochs=1)
    return [training.weights(one) for one in (model, again)], [r.numpy() for r in residuals]


@pytest.mark.distributed
def test_fit_save_load_continue(ranks, tmp_path):
    first, second = ranks(2, init="tensorflow").run(save_and_continue, str(tmp_path), timeout=200)
    for weights in (first[0][1], *second[0]):
        for mine, reference in zip(weights, first[0][0], strict=True):
            np.testing.assert_array_equal(mine, reference)
    assert not np.array_equal(first[1][0], second[1][0])  # residuals are each rank's own


def accumulated_steps():
    """Weights by step, summed here and summed by Keras, with a step in the middle that is bad."""
    def spoil(step, gradients):
        bad = step == 3 and hvd.rank() == 1
        return [tf.fill(g.shape, np.nan) if bad else g for g in gradients]

    found = []
    for here in ({"passes": 2}, {"keras": 2}):
        variables = synthetic_steps.make_variables(SHAPES)
        sgd = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1,
                                   gradient_accumulation_steps=here.get("keras"))
        optimizer = hvd.DistributedOptimizer(
            sgd, compression=hvd.Compression.topk(**KEEP), average_aggregated_gradients=True,
            backward_passes_per_step=here.get("passes", 1))
        seen = synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 6, compiled=True, passes=2,
                                         change=spoil)
        hvd.assert_replicas_equal(variables)
        found.append((seen, int(optimizer._hvd_ext.reducer.skipped_steps)))
    return found


@pytest.mark.distributed
def test_gradients_that_keras_accumulates(ranks):
    for (here, skipped), (in_keras, skipped_too) in ranks(2, init="tensorflow").run(accumulated_steps):
        np.testing.assert_allclose(in_keras, here, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(in_keras[3], in_keras[2])
        assert not np.array_equal(in_keras[4], in_keras[3])
        assert skipped == skipped_too == 1


def tape_steps():
    variables = synthetic_steps.make_variables(SHAPES)
    optimizer = hvd.AMSGrad(0.01)
    import hvd_ext.tensorflow as tensors

    @tf.function
    def step(*gradients):
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(v * g) for v, g in zip(variables, gradients, strict=True)])
        tape = tensors.DistributedGradientTape(
            tape, compression=hvd.Compression.topk(**KEEP), optimizer=optimizer)
        found = tape.gradient(loss, variables)
        optimizer.apply_gradients(zip(found, variables, strict=True))

    for number in range(5):
        step(*[tf.constant(g, tf.float32) for g in
               worker_gradients(SHAPES, worker=hvd.rank(), step=number)])
    traces = step.experimental_get_tracing_count()
    return synthetic_steps.flat(variables), traces


@pytest.mark.distributed
def test_tape_keeps_its_state_in_the_optimizer(ranks):
    for weights, traces in ranks(2, init="tensorflow").run(tape_steps):
        np.testing.assert_allclose(weights, oracle(2, 5), rtol=1e-4, atol=1e-5)
        assert traces <= 2


def test_bad_input():
    sgd = keras.optimizers.SGD
    topk = hvd.Compression.topk
    with pytest.raises(ValueError, match="cannot be combined"):
        hvd.DistributedOptimizer(sgd(0.1), compression=topk(0.1), op=hvd.Sum)
    with pytest.raises(NotImplementedError, match="way of its own"):
        hvd.DistributedOptimizer(training.OPTIMIZERS["multi"](), compression=topk(0.1))
    with pytest.raises(ValueError, match=r"betas\[0\] must be in \[0, 1\), got 1.0"):
        hvd.AMSGrad(betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="eps must be"):
        hvd.AMSGrad(eps=0)


def ratios_that_differ():
    """The error of a step whose ratio depends on the rank."""
    variables = synthetic_steps.make_variables(SHAPES)
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.1), compression=hvd.Compression.topk(
            lambda step: 0.1 if step < 2 else 0.1 + 0.2 * hvd.rank(), min_size=0))
    synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 2, compiled=True)
    try:
        synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 1, compiled=True, first=2)
    except tf.errors.InvalidArgumentError as error:
        return str(error)
    return None


@pytest.mark.distributed
def test_ratio_that_depends_on_the_rank_is_told_on_all(ranks):
    for said in ranks(2, init="tensorflow").run(ratios_that_differ):
        assert "depend on the step alone" in said


def embedding_with_topk():
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1),
                                         compression=hvd.Compression.topk(0.1))
    with pytest.raises(ValueError, match=r"IndexedSlices, which Compression.topk cannot take"):
        training.fit(training.embedding_model(), optimizer, hvd.rank(), hvd.size(), tokens=True)


@pytest.mark.distributed
def test_indexed_slices_are_refused_with_the_way_out(ranks):
    ranks(2, init="tensorflow").run(embedding_with_topk)

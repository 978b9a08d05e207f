"""Keras optimizers under Horovod: as in one process on the joined batch, the same bits on all ranks."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.tensorflow import training  # noqa: E402

ranked = pytest.mark.distributed


def fit_distributed(case, options, compile_options):
    rank, size = hvd.rank(), hvd.size()
    optimizer = training.OPTIMIZERS[case]()
    kind, name = type(optimizer), optimizer.name
    wrapped = hvd.DistributedOptimizer(optimizer, **options)
    assert isinstance(wrapped, kind)
    assert type(wrapped).__name__ == kind.__name__
    assert wrapped.name == name
    model = training.fit(training.dense_model(), wrapped, rank, size, **compile_options)
    hvd.assert_replicas_equal(model, optimizer=model.optimizer)
    return training.weights(model)


def assert_alike(by_rank, reference, tolerance=1e-5):
    for rank in by_rank[1:]:
        for mine, first in zip(rank, by_rank[0], strict=True):
            np.testing.assert_array_equal(mine, first)
    for mine, one in zip(by_rank[0], reference, strict=True):
        np.testing.assert_allclose(mine, one, atol=tolerance, rtol=tolerance)


@ranked
@pytest.mark.parametrize("case", training.OPTIMIZERS)
def test_fit_equals_one_process_on_the_joined_batch(ranks, case):
    by_rank = ranks(2, init="tensorflow").run(fit_distributed, case, {}, {})
    one = training.fit_joined(training.dense_model(), training.OPTIMIZERS[case](), 2)
    assert_alike(by_rank, training.weights(one))


@ranked
@pytest.mark.parametrize("options", [
    {"groups": 1}, {"groups": 2}, {"gradient_predivide_factor": 2.0}, {"name": "own.name"},
], ids=str)
def test_horovods_arguments(ranks, options):
    by_rank = ranks(2, init="tensorflow").run(fit_distributed, "momentum", options, {})
    one = training.fit_joined(training.dense_model(), training.OPTIMIZERS["momentum"](), 2)
    assert_alike(by_rank, training.weights(one))


@ranked
@pytest.mark.parametrize(("case", "options"), [
    ("momentum", {"run_eagerly": True}), ("momentum", {"steps_per_execution": 3}),
    ("accumulation", {"run_eagerly": True})], ids=str)
def test_ways_to_run_a_step(ranks, case, options):
    by_rank = ranks(2, init="tensorflow").run(fit_distributed, case, {}, options)
    one = training.fit_joined(training.dense_model(), training.OPTIMIZERS[case](), 2)
    assert_alike(by_rank, training.weights(one))


@ranked
def test_sum_is_size_times_the_mean(ranks):
    by_rank = ranks(2, init="tensorflow").run(fit_distributed, "clipnorm", {"op": hvd.Sum}, {})
    optimizer = keras.optimizers.SGD(0.1, clipnorm=0.05)
    update = optimizer.update_step
    clip = optimizer._clip_gradients
    optimizer._clip_gradients = lambda grads: clip([2.0 * grad for grad in grads])
    assert update is not None
    one = training.fit_joined(training.dense_model(), optimizer, 2)
    assert_alike(by_rank, training.weights(one))


@ranked
def test_backward_passes_per_step(ranks):
    options = {"backward_passes_per_step": 2, "average_aggregated_gradients": True}
    by_rank = ranks(2, init="tensorflow").run(fit_distributed, "momentum", options, {})
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True,
                                     gradient_accumulation_steps=2)
    one = training.fit_joined(training.dense_model(), optimizer, 2)
    assert_alike(by_rank, training.weights(one))


def fit_four():
    found = {case: fit_distributed(case, {}, {}) for case in ("momentum", "accumulation")}
    found["fp16"] = fit_distributed("momentum", {"compression": hvd.Compression.fp16}, {})
    return found


@ranked
def test_four_ranks(ranks):
    by_rank = ranks(4, init="tensorflow").run(fit_four, timeout=120)
    for case in by_rank[0]:
        name = "momentum" if case == "fp16" else case
        one = training.fit_joined(training.dense_model(), training.OPTIMIZERS[name](), 4)
        tolerance = 5e-3 if case == "fp16" else 1e-5
        assert_alike([rank[case] for rank in by_rank], training.weights(one), tolerance)


def fit_own_step():
    base = training.dense_model()
    model = training.OwnStep(base.inputs, base.outputs)
    optimizer = hvd.DistributedOptimizer(training.OPTIMIZERS["momentum"]())
    training.fit(model, optimizer, hvd.rank(), hvd.size())
    return training.weights(model)


@ranked
def test_own_train_step(ranks):
    by_rank = ranks(2, init="tensorflow").run(fit_own_step)
    one = training.fit_joined(training.dense_model(), training.OPTIMIZERS["momentum"](), 2)
    assert_alike(by_rank, training.weights(one))


def fit_embedding(sparse_as_dense):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.5),
                                         sparse_as_dense=sparse_as_dense)
    model = training.fit(training.embedding_model(), optimizer, hvd.rank(), hvd.size(),
                         tokens=True)
    return training.weights(model)


@ranked
@pytest.mark.parametrize("sparse_as_dense", [False, True])
def test_indexed_slices(ranks, sparse_as_dense):
    by_rank = ranks(2, init="tensorflow").run(fit_embedding, sparse_as_dense)
    one = training.fit_joined(training.embedding_model(), keras.optimizers.SGD(0.5), 2,
                              tokens=True)
    assert_alike(by_rank, training.weights(one))


def fit_mixed(outer, topk):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = training.dense_model()
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        if outer:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer = hvd.DistributedOptimizer(optimizer, compression=hvd.Compression.topk(1.0, min_size=0)
                                             if topk else hvd.Compression.none)
        if hvd.rank() == 1:  # an overflow on one rank only, in one step
            training_data = training.data
            training.data = lambda: _spoiled(training_data())
        try:
            training.fit(model, optimizer, hvd.rank(), hvd.size())
        finally:
            if hvd.rank() == 1:
                training.data = training_data
        scale = model.optimizer
        assert isinstance(scale, keras.optimizers.LossScaleOptimizer)
        hvd.assert_replicas_equal(model, optimizer=scale)
        return (training.weights(model), float(scale.dynamic_scale),
                int(scale.inner_optimizer._iterations))
    finally:
        keras.config.set_dtype_policy("float32")


def _spoiled(arrays):
    x, y = arrays
    x = x.copy()
    x[training.BATCH * 2 + 1] = np.inf
    return x, y


@ranked
@pytest.mark.parametrize(("outer", "topk"), [(False, False), (True, False), (True, True)])
def test_loss_scale_backs_off_on_all_ranks_alike(ranks, outer, topk):
    by_rank = ranks(2, init="tensorflow").run(fit_mixed, outer, topk)
    assert [rank[1] for rank in by_rank] == [2.0**13] * 2  # one bad step in each of two epochs
    assert [rank[2] for rank in by_rank] == [2 * training.STEPS - 2] * 2
    for mine, first in zip(by_rank[1][0], by_rank[0][0], strict=True):
        np.testing.assert_array_equal(mine, first)
        assert np.isfinite(mine).all()


def fit_and_reload(path):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(training.schedule()))
    model = training.fit(training.dense_model(), optimizer, hvd.rank(), hvd.size())
    if hvd.rank() == 0:
        model.save(path)
    hvd.allreduce([0.0], name="saved")
    plain = keras.models.load_model(path)
    assert type(plain.optimizer) is keras.optimizers.Adam
    again = hvd.load_model(path)
    assert len(again.optimizer.variables) == len(model.optimizer.variables)
    for mine, theirs in zip(again.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(np.array(mine), np.array(theirs))
    with pytest.raises(ValueError, match="distributed already"):
        hvd.DistributedOptimizer(again.optimizer)
    wrapped_late = hvd.DistributedOptimizer(plain.optimizer)
    for one in (model, again):
        training.fit(one, one.optimizer, hvd.rank(), hvd.size(), epochs=1)
    training.fit(plain, wrapped_late, hvd.rank(), hvd.size(), epochs=1)
    return [training.weights(one) for one in (model, again, plain)]


@ranked
def test_save_load_continue(ranks, tmp_path):
    by_rank = ranks(2, init="tensorflow").run(fit_and_reload, str(tmp_path / "model.keras"))
    for model in range(3):
        assert_alike([rank[model] for rank in by_rank], by_rank[0][0], tolerance=0)


def jit_on_ranks():
    x, y = training.data()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    model = training.dense_model()
    model.compile(optimizer, "mse", jit_compile=True)
    with pytest.raises(NotImplementedError, match="jit_compile=False"):
        model.fit(x, y, batch_size=4, verbose=0)


@ranked
def test_jit_compile_is_a_clear_error(ranks):
    ranks(2, init="tensorflow").run(jit_on_ranks)


def test_automatic_jit_stays_off(monkeypatch):
    class Device:
        device_type = "GPU"

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *_: [Device()])
    plain, distributed = training.dense_model(), training.dense_model()
    plain.compile(keras.optimizers.SGD(0.1), "mse")
    distributed.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    assert plain.jit_compile
    assert not distributed.jit_compile


def test_bad_input(monkeypatch):
    sgd = keras.optimizers.SGD
    with pytest.raises(TypeError, match=r"must be a keras.optimizers.Optimizer, got 'sgd'"):
        hvd.DistributedOptimizer("sgd")
    for optimizer in (sgd(0.1), keras.optimizers.LossScaleOptimizer(sgd(0.1))):
        hvd.DistributedOptimizer(optimizer)
        with pytest.raises(ValueError, match="distributed already"):
            hvd.DistributedOptimizer(optimizer)
    with pytest.raises(ValueError, match="distributed already"):
        hvd.DistributedOptimizer(
            keras.optimizers.LossScaleOptimizer(hvd.DistributedOptimizer(sgd(0.1))))
    with pytest.raises(ValueError, match="op must be"):
        hvd.DistributedOptimizer(sgd(0.1), op=hvd.Average + 77)
    with pytest.raises(ValueError, match="backward_passes_per_step must be at least 1, got 0"):
        hvd.DistributedOptimizer(sgd(0.1), backward_passes_per_step=0)
    with pytest.raises(ValueError, match="both accumulate"):
        hvd.DistributedOptimizer(sgd(0.1, gradient_accumulation_steps=2),
                                 backward_passes_per_step=2)
    with pytest.raises(ValueError, match="gradient_predivide_factor"):
        hvd.DistributedOptimizer(sgd(0.1), op=hvd.Sum, gradient_predivide_factor=2.0)
    with pytest.raises(ValueError, match="groups"):
        hvd.DistributedOptimizer(sgd(0.1), groups=-1)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match=r"runs on 'jax': set KERAS_BACKEND=tensorflow"):
        hvd.DistributedOptimizer(sgd(0.1))

"""Callbacks, elastic state and the check of replicas under Keras 3."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.tensorflow import training  # noqa: E402

BatchLog = list


class Recorder(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.rates: BatchLog = []
        self.logs: BatchLog = []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate))

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))


def broadcast_and_average():
    rank = hvd.rank()
    model = training.dense_model()
    for weight in model.weights:
        weight.assign(weight + 0.1 * rank)  # replicas that start apart
    with pytest.raises(hvd.ReplicasDifferError, match="4 of 4 tensors differ"):
        hvd.assert_replicas_equal(model)
    recorder = Recorder()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01 * (1 + rank)))
    training.fit(model, optimizer, rank, hvd.size(), callbacks=[
        hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.AssertReplicasEqualCallback(batches=2), recorder])
    return training.weights(model), recorder.logs, recorder.rates[-1]


@pytest.mark.distributed
def test_broadcast_and_metric_average(ranks):
    by_rank = ranks(2, init="tensorflow").run(broadcast_and_average)
    one = training.fit_joined(training.dense_model(), keras.optimizers.Adam(0.01), 2)
    for mine, reference in zip(by_rank[1][0], training.weights(one), strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-5)
    assert by_rank[0][1] == by_rank[1][1]
    assert by_rank[0][2] == by_rank[1][2] == pytest.approx(0.01)


def drift():
    rank = hvd.rank()
    model = training.fit(training.dense_model(), keras.optimizers.SGD(0.1), 0, 2)
    said = []
    try:
        training.fit(model, keras.optimizers.SGD(0.1), rank, 2, epochs=5,
                     callbacks=[hvd.callbacks.AssertReplicasEqualCallback(batches=1)])
    except hvd.ReplicasDifferError as error:
        said.append((int(model.optimizer.iterations), str(error)))
    return said


@pytest.mark.distributed
def test_drift_is_told_after_the_first_step_on_all_ranks(ranks):
    first, second = ranks(2, init="tensorflow").run(drift)
    assert first == second
    assert first[0][0] == 1
    assert "rank 1" in first[0][1]
    assert "kernel" in first[0][1]


def rates_on_ranks():
    found = {}
    for name, callback, optimizer in [
        ("warmup", hvd.callbacks.LearningRateWarmupCallback(0.4, warmup_epochs=2),
         keras.optimizers.SGD(0.4)),
        ("staircase", hvd.callbacks.LearningRateScheduleCallback(0.4, lambda epoch: 0.5**epoch),
         keras.optimizers.SGD(0.4)),
        ("constant", hvd.callbacks.LearningRateScheduleCallback(0.4, 0.5, start_epoch=1),
         keras.optimizers.SGD(0.4)),
    ]:
        recorder = Recorder()
        training.fit(training.dense_model(), hvd.DistributedOptimizer(optimizer), hvd.rank(),
                     hvd.size(), epochs=3, callbacks=[callback, recorder])
        found[name] = recorder.rates
        assert recorder.logs[-1]["lr"] == pytest.approx(recorder.rates[-1])
    return found


@pytest.mark.distributed
def test_learning_rate_callbacks(ranks):
    found = ranks(2, init="tensorflow").run(rates_on_ranks)[0]
    steps = training.STEPS
    warm = [0.2 * (1 + min(1.0, (step + 1) / (2 * steps))) for step in range(3 * steps)]
    np.testing.assert_allclose(found["warmup"], warm, rtol=1e-5)
    stairs = [0.4 * 0.5**epoch for epoch in range(3) for _ in range(steps)]
    np.testing.assert_allclose(found["staircase"], stairs, rtol=1e-5)
    late = [0.4 * 0.5 ** max(0, epoch - 1) for epoch in range(3) for _ in range(steps)]
    np.testing.assert_allclose(found["constant"], late, rtol=1e-5)


def test_momentum_correction_scales_the_buffers():
    def weights_after(correction):
        model = training.dense_model()
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        callback = hvd.callbacks.LearningRateScheduleCallback(
            0.1, lambda epoch: 0.1**epoch, momentum_correction=correction)
        training.fit(model, optimizer, 0, 1, epochs=2, callbacks=[callback])
        return training.weights(model), optimizer

    corrected, optimizer = weights_after(True)
    plain, _ = weights_after(False)
    assert not np.allclose(corrected[0], plain[0])

    # By hand: velocity without the learning rate in it, as in Goyal et al. 2017, eq. 9.
    model = training.dense_model()
    x, y = training.data()
    velocity = [np.zeros(weight.shape) for weight in model.weights]
    for epoch in range(2):
        for step in range(training.STEPS):
            rows = slice(step * training.BATCH, (step + 1) * training.BATCH)
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x[rows]) - y[rows]) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            for number, gradient in enumerate(gradients):
                velocity[number] = 0.9 * velocity[number] + gradient.numpy()
                model.weights[number].assign(
                    model.weights[number] - 0.1 * 0.1**epoch * velocity[number])
    for mine, reference in zip(corrected, training.weights(model), strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-5)
    assert optimizer.momentum == 0.9


@pytest.mark.parametrize(("make", "factor"), [
    (lambda: keras.optimizers.SGD(0.1, momentum=0.9), 0.25),
    (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.RMSprop(0.1, momentum=0.9)), 0.25),
    (lambda: keras.optimizers.SGD(0.1), None), (lambda: keras.optimizers.RMSprop(0.1), None),
    (lambda: keras.optimizers.Muon(0.1), 1.0), (lambda: hvd.Muon(0.1), 1.0),
    (lambda: keras.optimizers.Adam(0.1), 1.0), (lambda: keras.optimizers.Nadam(0.1), 1.0),
    (lambda: keras.optimizers.Lion(0.1), 1.0)])
def test_momentum_correction_is_for_buffers_that_hold_steps(make, factor):
    """Of Muon and Adam they hold gradients, whatever the learning rate was."""
    model, optimizer = training.dense_model(), make()
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    buffers = [one for one in inner.variables if "momentum" in one.path]
    assert bool(buffers) == (factor is not None)
    for one in buffers:
        one.assign(tf.ones(one.shape))
    callback = hvd.callbacks.LearningRateScheduleCallback(0.1, lambda epoch: 0.25)
    callback.set_model(model)
    callback.on_epoch_begin(0)
    callback.on_train_batch_begin(0)
    assert float(inner.learning_rate) == pytest.approx(0.025)
    for one in buffers:
        np.testing.assert_allclose(one.numpy(), factor, rtol=1e-6)


def elastic_state():
    model = training.dense_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)), "mse")
    for weight in model.weights:
        weight.assign(weight + hvd.rank())
    state = hvd.elastic.KerasState(model, epoch=0)
    state.sync()
    hvd.assert_replicas_equal(model)
    before = training.weights(model)
    training.fit(model, model.optimizer, hvd.rank(), hvd.size(), epochs=1)
    assert not np.array_equal(training.weights(model)[0], before[0])
    state.restore()
    assert int(model.optimizer.iterations) == 0
    for mine, saved in zip(training.weights(model), before, strict=True):
        np.testing.assert_array_equal(mine, saved)


@pytest.mark.distributed
def test_elastic_state(ranks):
    ranks(2, init="tensorflow").run(elastic_state)


def uneven_metrics():
    logs = {"loss": 1.0} if hvd.rank() else {"loss": 3.0, "val_loss": 1.0}
    with pytest.raises(ValueError, match="rank 1: loss"):
        hvd.callbacks.MetricAverageCallback().on_epoch_end(0, logs)


@pytest.mark.distributed
def test_metrics_that_only_some_ranks_have(ranks):
    ranks(2, init="tensorflow").run(uneven_metrics)


def test_best_models_take_the_order_of_both_packages_of_horovod():
    def settings(*args, **more):
        made = hvd.callbacks.BestModelCheckpoint(*args, **more)
        return made.monitor, made.save_weights_only, made.mode, made.save_freq

    assert settings("accuracy", 0, True, "min", 5) == ("accuracy", True, "min", 5)
    assert settings("accuracy", 0, "min", 5) == ("accuracy", False, "min", 5)  # horovod.keras
    assert settings("accuracy", 0, "max") == ("accuracy", False, "max", "epoch")
    assert settings("loss", 0, "max", save_freq=5) == ("loss", False, "max", 5)


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match="no weights yet"):
        hvd.assert_replicas_equal(keras.Sequential([keras.layers.Dense(2)]))
    with pytest.raises(ValueError, match="must be variables"):
        hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=["kernel"])
    with pytest.raises(ValueError, match="initial_lr is required"):
        hvd.callbacks.LearningRateScheduleCallback(None, 0.5)
    with pytest.raises(ValueError, match="warmup_epochs"):
        hvd.callbacks.LearningRateWarmupCallback(0.1, warmup_epochs=0)
    with pytest.raises(ValueError, match="legacy"):
        hvd.load_model("nowhere", legacy_opts=True)
    with pytest.raises(ValueError, match="built first"):
        hvd.elastic.KerasState(keras.Sequential([keras.layers.Dense(2)]))
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(RuntimeError, match=r"or train with hvd_ext\.torch"):
        hvd.callbacks.MetricAverageCallback()


def reports(folder):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), server="sharded",
                                         compression=hvd.Compression.topk(0.5, min_size=1))
    shown = []

    class Writer:
        def add_scalar(self, name, value, step):
            shown.append((name, value, step))

    training.fit(training.dense_model(), optimizer, hvd.rank(), hvd.size(), callbacks=[
        hvd.callbacks.ReportCallback(folder), hvd.callbacks.ReportCallback(Writer(), batches=3)])
    return shown, optimizer.report()


@pytest.mark.distributed
def test_reports_for_tensorboard(ranks, tmp_path):
    by_rank = ranks(2, init="tensorflow").run(reports, str(tmp_path))
    for rank, (shown, report) in enumerate(by_rank):
        last = {name: value for name, value, step in shown if step == 2 * training.STEPS}
        assert sorted({step for _, _, step in shown}) == [3, 6, 9, 12]
        assert last["hvd_ext/sent/values"] == report["sent"]["values"] > 0
        assert last["hvd_ext/server/owned_elements"] == report["server"]["owned_elements"]
        (file,) = (tmp_path / f"rank{rank}").iterdir()
        written = {}
        for record in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                written[event.step, value.tag] = float(tf.make_ndarray(value.tensor))
        assert {step for step, _ in written} == {6, 12}
        assert {tag: value for (step, tag), value in written.items() if step == 12} == pytest.approx(last)


def reports_under_mixed_precision():
    """By way to come to a LossScaleOptimizer: figures written, and its public methods."""
    keras.config.set_dtype_policy("mixed_float16")
    found = {}
    try:
        for way in ("compile", "given"):
            optimizer = keras.optimizers.SGD(0.1)
            if way == "given":
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
            optimizer = hvd.DistributedOptimizer(optimizer, compression=hvd.Compression.topk(0.5, min_size=1))
            shown = {}

            class Writer:
                def add_scalar(self, name, value, step, shown=shown):
                    shown[name] = value

            model = training.fit(training.dense_model(), optimizer, hvd.rank(), hvd.size(), epochs=1,
                                 callbacks=[hvd.callbacks.ReportCallback(Writer())])
            outer = model.optimizer
            assert isinstance(outer, keras.optimizers.LossScaleOptimizer)
            residual = outer.inner_optimizer._hvd_ext.reducer.residual[0]
            assert float(tf.norm(residual)) > 0.0
            outer.flush()
            with outer.exact_weights():
                pass
            outer.reset_per_rank_state()
            with pytest.raises(ValueError, match="after the optimizer was built"):
                outer.register_local_var(model.trainable_variables[0])
            found[way] = shown["hvd_ext/residual_norm"], float(tf.norm(residual))
    finally:
        keras.config.set_dtype_policy("float32")
    plain = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    assert not hasattr(plain, "report")
    assert not hasattr(plain, "flush")
    return found


@pytest.mark.distributed
def test_a_loss_scale_optimizer_has_the_methods_of_the_distributed_one(ranks):
    for found in ranks(2, init="tensorflow").run(reports_under_mixed_precision, timeout=150):
        for norm, after in found.values():
            assert norm > 0.0
            assert after == 0.0


def test_a_report_that_nobody_can_write():
    with pytest.raises(TypeError, match="writer must be a folder"):
        hvd.callbacks.ReportCallback(7)
    with pytest.raises(ValueError, match="batches"):
        hvd.callbacks.ReportCallback("folder", batches=0)
    with pytest.raises(TypeError, match=r"has no report\(\)"):
        training.fit(training.dense_model(), keras.optimizers.SGD(0.1), 0, 1,
                     callbacks=[hvd.callbacks.ReportCallback("folder")])

"""``optimizer.report()``: bytes as by formula and as in PyTorch, in every way to run a step."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")
pytest.importorskip("torch", reason="the cross-checks need PyTorch")

import keras  # noqa: E402

import hvd_ext.tensorflow as hvd  # noqa: E402
from hvd_ext.reducers.topk import Layout, TopK  # noqa: E402
from tests.tensorflow import synthetic_steps, training, twins  # noqa: E402

STEPS = 3


def reports():
    """Reports by way to run a step and case."""
    found = {}
    for name, options in twins.cases(hvd).items():
        for way in ("traced", "eager") if name in ("topk", "sharded") else ("traced",):
            optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), **options)
            synthetic_steps.run_steps(optimizer, synthetic_steps.make_variables(twins.SHAPES), hvd.rank(),
                                      STEPS,
                                      compiled=way == "traced")
            found[way, name] = optimizer.report()
        if name in ("topk", "delay"):
            found["tape", name] = of_tape(options)
    found["tape", "plain"] = of_tape({})
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), sparse_as_dense=False)
    training.fit(training.embedding_model(), optimizer, hvd.rank(), hvd.size(), tokens=True)
    found["slices"] = optimizer.report()
    model = training.dense_model()
    seng = hvd.SENG(model, damping=0.5, update_freq=3)
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), preconditioner=seng)
    training.fit(model, optimizer, hvd.rank(), hvd.size(), epochs=1)
    found["seng"] = {key: optimizer.report()[key] for key in ("sent", "received")}
    return found


def of_tape(options):
    variables = synthetic_steps.make_variables(twins.SHAPES)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)

    @tf.function
    def step(*gradients):
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(v * g) for v, g in zip(variables, gradients, strict=True)])
        tape = hvd.DistributedGradientTape(tape, optimizer=optimizer, **options)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    for number in range(STEPS):
        step(*[tf.constant(g, tf.float32) for g in synthetic_steps.worker_gradients(
            twins.SHAPES, worker=hvd.rank(), step=number)])
    return optimizer.report()


def without_agreement(moved):
    """The short message by which ranks agree is not the same in both front ends."""
    return {kind: count for kind, count in moved.items() if kind != "agreement"}


@pytest.mark.distributed
def test_bytes_are_those_of_the_formula_and_of_pytorch(ranks):
    ours = ranks(2, init="tensorflow").run(reports, timeout=150)
    theirs = ranks(2).run(twins.torch_reports, STEPS, timeout=100)
    for mine, torchs in zip(ours, theirs, strict=True):
        for (_, name), report in ((key, found) for key, found in mine.items() if len(key) == 2):
            assert report["steps"] == torchs[name]["steps"] == STEPS, name
            if name == "sharded":  # cut at other places in the two
                numel = sum(int(np.prod(shape)) for shape in twins.SHAPES)
                for one in (report, torchs[name]):
                    owned = one["server"]["owned_elements"]
                    assert one["sent"]["gradients"] == 4 * (numel - owned)
                    assert one["received"]["gradients"] == 4 * owned
                assert report["server"].keys() == torchs[name]["server"].keys()
                continue
            for way in ("sent", "received"):
                assert without_agreement(report[way]) == without_agreement(torchs[name][way]), name
            for key in ("steps", "skipped_steps", "unusable_steps", "kept_fraction", "ratio", "buckets",
                        "step_taken", "compressed_elements", "dense_elements", "workers"):
                assert report.get(key) == torchs[name].get(key), (name, key)
            if "residual_norm" in report:
                assert report["residual_norm"] == pytest.approx(torchs[name]["residual_norm"], rel=1e-5)
            if name in ("plain", "rank0") and "server" in report:
                assert report["server"].keys() == torchs[name]["server"].keys()
                for key in ("where", "owned_elements", "elements", "largest_share", "state_bytes"):
                    assert report["server"][key] == torchs[name]["server"][key]
        numels = [int(np.prod(shape)) for shape in twins.SHAPES]
        plain = mine["traced", "plain"]
        agreement = 8 * len(numels)  # which gradients are missing
        assert plain["sent"] == plain["received"] == {"gradients": 4 * sum(numels),  # 2 (M-1)/M
                                                      "agreement": agreement}
        assert mine["traced", "fp16"]["sent"] == {"gradients": 2 * sum(numels), "agreement": agreement}
        parts = Layout(round(0.05 * (407 + 81)), "float32").bytes_by_kind()
        assert without_agreement(mine["traced", "topk"]["sent"]) == {**parts, "dense": 4 * 50}
        assert TopK(0.05).ratio == mine["traced", "topk"]["ratio"]
        delay = mine["traced", "delay"]
        assert delay["sent"]["gradients"] + delay["received"]["gradients"] == 2 * 4 * sum(numels)
        # Embedding: 4 rows of 5 tokens with 4 numbers each, and their int64 or int32 indices.
        dense = 4 * (20 * 3 + 3)
        assert mine["slices"]["sent"]["gradients"] - dense in (20 * (16 + 4), 20 * (16 + 8))
        assert mine["seng"]["sent"].keys() == {"gradients", "agreement", "curvature"}


def count_updates():
    """The steps in reports after steps of two passes, and after ``flush()``."""
    found = []
    for options in ({}, {"server": "sharded"}, {"overlap": hvd.DelayedUpdate()}):
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), backward_passes_per_step=2, **options)
        synthetic_steps.run_steps(optimizer, synthetic_steps.make_variables(twins.SHAPES), hvd.rank(),
                                  STEPS, compiled=True, passes=2)
        found.append(optimizer.report()["steps"])
        if "overlap" in options:
            optimizer.flush()
            found.append(optimizer.report()["steps"])
    return found


@pytest.mark.distributed
def test_updates_are_counted_whatever_reduces(ranks):
    wanted = [STEPS, STEPS, STEPS - 1, STEPS]
    assert ranks(2, init="tensorflow").run(count_updates, timeout=100) == [wanted] * 2


def test_before_the_first_step():
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1),
                                         compression=hvd.Compression.topk(0.1))
    report = optimizer.report()
    assert (report["steps"], report["residual_norm"], report["sent"], report["received"]) == (0, 0, {}, {})

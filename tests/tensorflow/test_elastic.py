"""Horovod elastic under TensorFlow with ranks that come and go, in a loop of one's own and in ``fit``."""

from __future__ import annotations

import ast
import contextlib
import os
import time

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402
from horovod.common.exceptions import HostsUpdatedInterrupt  # noqa: E402
from horovod.runner.elastic.worker import HostUpdateResult  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from hvd_ext.tensorflow import DistributedGradientTape  # noqa: E402
from hvd_ext.tensorflow.elastic import TensorFlowState  # noqa: E402
from tests.elastic_runs import run_elastic  # noqa: E402
from tests.tensorflow.elastic_program import FIT_STEPS, METHODS, STEPS, fit, train_all  # noqa: E402
from tests.tensorflow.synthetic_steps import flat, make_variables  # noqa: E402

GLOO = 60  # a rank that joins imports TensorFlow first: more than 30 s where other jobs have the cores

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def sizes(path):
    """Ranks at each step; the last word on one that was repeated."""
    return {int(step): int(ranks) for step, ranks in map(str.split, path.read_text().splitlines())}


@pytest.mark.parametrize("methods", [
    pytest.param(("delay", "seng", "topk_sharded", "topk_late"), id="some", marks=pytest.mark.extended),
    pytest.param(tuple(METHODS), id="all", marks=pytest.mark.soak)])
def test_ranks_come_and_go(ranks, tmp_path, methods):
    """2, 3, 2, 3 and 2 ranks: one leaves in good order, one is killed."""
    ranks.end()
    status, log = run_elastic("tests.tensorflow.elastic_program", tmp_path, *methods, seconds=450, gloo=GLOO)
    assert status == 0, log[-6000:]
    seen = sizes(tmp_path / "seen.localhost.0")
    assert [seen[step] for step in (4, 9, 14, 19, 20, STEPS)] == [2, 3, 2, 3, 2, 2]
    calm = ranks(2, init="tensorflow").run(train_all, None, methods, timeout=120)[0]
    disturbed = ast.literal_eval((tmp_path / "result").read_text())
    assert (*disturbed,) == (*calm,) == methods
    for method, result in disturbed.items():
        assert result["loss"] == pytest.approx(calm[method]["loss"], rel=0.15), (method, calm)
        feedback = method in ("topk", "powersgd", "topk_sharded", "topk_late")
        assert result["lost_residuals"] == (1 if feedback else None), method


@pytest.mark.extended
def test_ranks_come_and_go_in_fit(ranks, tmp_path):
    """2, 3 and 2 ranks, all in good order."""
    ranks.end()
    status, log = run_elastic("tests.tensorflow.elastic_program", tmp_path, gloo=GLOO)
    assert status == 0, log[-6000:]
    fitted = sizes(tmp_path / "fitted.localhost.0")
    assert [fitted[step] for step in (5, 10, FIT_STEPS)] == [2, 3, 2]
    calm = ranks(2, init="tensorflow").run(fit)[0]
    disturbed = ast.literal_eval((tmp_path / "result").read_text())
    assert disturbed["loss"] == pytest.approx(calm["loss"], rel=0.15)
    assert disturbed["lost_residuals"] == 0


@contextlib.contextmanager
def elastic():
    """As under horovodrun with a discovery script."""
    os.environ["HOROVOD_ELASTIC"] = "1"
    try:
        yield
    finally:
        del os.environ["HOROVOD_ELASTIC"]


SHAPES = [(6, 5), (4, 3)]
EXTENSIONS = {
    "topk": lambda: {"compression": hvd.Compression.topk(0.3, min_size=0)},
    "powersgd": lambda: {"compression": hvd.Compression.powersgd(1, min_compression=1.0)},
    "delay": lambda: {"op": hvd.DelayCompensated(0.5)},
}


def trained(name, variables):
    """An optimizer, its state, and a step in one ``tf.function``."""
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), name=name, **EXTENSIONS[name]())
    optimizer.build(variables)
    state = TensorFlowState([*variables, *optimizer.variables])

    @tf.function
    def step(*gradients):
        optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))

    return optimizer, state, step


def made(number):
    rng = np.random.default_rng([hvd.rank(), number])
    return [tf.constant(rng.standard_normal(shape), tf.float32) for shape in SHAPES]


def hand_on():
    """Rank 2 of three goes in good order and comes back as a new one; what was kept before and after."""
    found = {}
    with elastic():
        for name in EXTENSIONS:
            variables = make_variables(SHAPES)
            optimizer, state, step = trained(name, variables)
            state.sync()
            for number in range(3):
                step(*made(number))
            stale = step.get_concrete_function(*made(0))
            reducer = optimizer._hvd_ext.reducer
            before = flat(reducer.per_rank_state())
            if hvd.rank() == 0:
                state.on_hosts_updated(time.time(), HostUpdateResult.mixed)
            with pytest.raises(HostsUpdatedInterrupt) as raised:
                state.commit()
            assert not raised.value.skip_sync
            if hvd.rank() == 2:
                optimizer, state, step = trained(name, variables)
                reducer = optimizer._hvd_ext.reducer
            state.sync()
            found[name] = before, flat(reducer.per_rank_state())
            assert optimizer.report()["steps"] == 3
            traces = step.experimental_get_tracing_count()
            step(*made(3))
            assert step.experimental_get_tracing_count() > traces
            hvd.assert_replicas_equal(variables)
            if hvd.rank() != 2:
                with pytest.raises(tf.errors.InvalidArgumentError, match="traced for other ranks"):
                    stale(*made(3))
    return found


def test_what_ranks_keep_is_handed_on(ranks):
    """Residuals become their mean everywhere, so that nothing is lost; MeanSquare is whole everywhere."""
    everyone = ranks(3, init="tensorflow").run(hand_on)
    for name in ("topk", "powersgd"):
        mean = np.mean([one[name][0] for one in everyone], axis=0)
        assert np.abs(mean).max() > 1e-2
        for one in everyone:
            assert np.abs(one[name][0] - mean).max() > 1e-2
            np.testing.assert_allclose(one[name][1], mean, rtol=1e-5, atol=1e-7)
    whole = sum(one["delay"][0] for one in everyone)  # each has its slice and zeros before
    assert np.all(whole > 0)
    for one in everyone:
        np.testing.assert_array_equal(one["delay"][1].astype("float32"), whole.astype("float32"))


def refusals():
    with elastic():
        optimizer = keras.optimizers.SGD(0.1)
        with pytest.raises(NotImplementedError, match="give the extension to"):
            DistributedGradientTape(tf.GradientTape(), op=hvd.DelayCompensated(), optimizer=optimizer)
        with pytest.raises(ValueError, match="give variables="):
            TensorFlowState([])
        state = TensorFlowState([tf.Variable(tf.zeros(2 + hvd.rank()))])
        with pytest.raises(ValueError, match="do not broadcast the same"):
            state.sync()


def test_what_cannot_be_carried_is_refused(ranks):
    ranks(2, init="tensorflow").run(refusals)

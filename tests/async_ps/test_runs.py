"""Real MPI runs against the delay engine and against one process."""

import re

import numpy as np
import pytest

from hvd_ext.reducers.delay_compensation.engine import replay
from hvd_ext.reducers.delay_compensation.momentum import AutoMomentum
from hvd_ext.reducers.delay_compensation.update_rules import AsyncRule
from tests.async_ps import runs

pytestmark = [pytest.mark.distributed, pytest.mark.idle_ranks]

RULES = [("asgd", None), ("dc-asgd-c", 0.3), ("dc-asgd-a", 1.0)]


def replayed(recording, options, dtype="float32"):
    """The weights the engine reaches with the recorded delays."""
    senders, batches = recording.senders, recording.batches
    momentum = options.get("momentum", 0.0)
    return replay(
        lambda w, k: runs.gradient(w, int(senders[k]), int(batches[k])),
        runs.flat(runs.start(np.dtype(dtype))), steps=len(recording), delays=recording,
        lr=lambda k: recording.lr[k],
        momentum=AutoMomentum() if momentum == "auto" else momentum,
        rule=AsyncRule(name=options["rule"], lam=options.get("lam")),
    ).weights


def check(results, options, servers, steps, dtype="float32"):
    """All ranks hold the same weights, and the engine's."""
    told = results[0]
    workers = [result for result in results if result is not None][servers:]
    for result in results[1:]:
        if result is not None:
            np.testing.assert_array_equal(result["weights"], told["weights"])
    report = told["report"]
    assert report.updates == steps * len(workers)
    assert len(told["recording"]) == report.updates
    assert [worker.updates for worker in report.workers] == [steps] * len(workers)
    assert report.delay.count == sum(report.delay.histogram) == report.updates
    assert report.bytes_pushed == report.updates * runs.N * np.dtype(dtype).itemsize
    for result in workers:
        assert result["report"] == report
        assert result["updates"] == report.updates
    # the same kernels in the same order give the same bits
    np.testing.assert_array_equal(told["weights"], replayed(told["recording"], options, dtype))
    return told


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize(("rule", "lam"), RULES)
def test_recorded_delays_replay_to_the_same_weights(pool, rule, lam, servers):
    options = {"lr": 0.02, "rule": rule, "lam": lam, "servers": servers, "momentum": 0.5}
    results = pool.run(runs.train, options, 40, timeout=60)
    told = check(results, options, servers, 40)
    assert told["report"].delay.mean > 0.5  # it really was asynchronous


def test_prefetch_counts_its_extra_delay(pool):
    options = {"lr": 0.02, "rule": "dc-asgd-c", "lam": 0.3, "prefetch": True}
    ahead = check(pool.run(runs.train_paused, options, 40, timeout=60), options, 1, 40)
    options = {**options, "prefetch": False}
    plain = check(pool.run(runs.train_paused, options, 40, timeout=60), options, 1, 40)
    assert ahead["report"].delay.mean > plain["report"].delay.mean + 1.0


def test_auto_momentum_and_schedule_replay(pool):
    options = {"lr": runs.halved, "rule": "asgd", "momentum": "auto", "updates_per_epoch": 30}
    told = check(pool.run(runs.train, options, 40, timeout=60), options, 1, 40, "float32")
    recording = told["recording"]
    np.testing.assert_allclose(recording.lr, 0.02 * 0.5 ** (np.arange(120) // 30))
    late = recording.delays.max()
    assert recording.momentum[-1] <= 0.9
    assert recording.momentum.min() == pytest.approx(max(0.0, 1 - 0.1 * np.sqrt(late)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("servers", [1, 3])
def test_one_worker_is_sequential_sgd_bit_for_bit(pool, servers, dtype):
    for rule in ("asgd", "dc-asgd-a"):
        options = {"lr": 0.05, "rule": rule, "servers": servers}
        results = pool.run(runs.train_some, options, 30, servers + 1, dtype, timeout=60)
        w = runs.flat(runs.start(np.dtype(dtype)))
        for k in range(30):
            w -= runs.gradient(w, 0, k) * w.dtype.type(0.05)
        np.testing.assert_array_equal(results[0]["weights"], w)
        assert results[0]["report"].delay.maximum == 0


def test_gradients_that_are_not_finite_are_dropped_and_counted(pool):
    for servers in (1, 2):
        options = {"lr": 0.02, "rule": "dc-asgd-a", "lam": 0.5, "servers": servers}
        results = pool.run(runs.train_with_nan, options, 30, timeout=60)
        report = results[0]["report"]
        assert report.not_finite == 2
        assert report.workers[0].not_finite == 2
        assert report.updates == 30 * len(report.workers) - 2
        assert np.isfinite(results[0]["weights"]).all()
        np.testing.assert_array_equal(results[0]["weights"],
                                      replayed(results[0]["recording"], options))


def test_snapshot_is_a_state_between_two_updates(pool):
    options = {"lr": 0.02, "rule": "asgd", "servers": 2, "momentum": 0.3}
    results = pool.run(runs.train_with_snapshots, options, 30, timeout=60)
    recording = results[0]["recording"]
    seen = replay(
        lambda w, k: runs.gradient(w, int(recording.senders[k]), int(recording.batches[k])),
        runs.flat(runs.start()), steps=len(recording), delays=recording, lr=0.02, momentum=0.3,
        observe=lambda w, k: w.copy(),
    ).observed
    for result in results[2:]:
        assert len(result["snapshots"]) == 6
        for update, weights in result["snapshots"]:
            np.testing.assert_array_equal(weights, seen[update])


def test_broadcast_starts_everybody_from_rank_0(pool):
    results = pool.run(runs.train_from_different_starts, {"lr": 0.02, "rule": "asgd"}, 5)
    for result in results[1:]:
        np.testing.assert_array_equal(result["weights"], results[0]["weights"])
    options = {"rule": "asgd"}
    np.testing.assert_array_equal(results[0]["weights"],
                                  replayed(results[0]["recording"], options))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("shapes", "rank 3 is refused: its parameters differ from rank 0's, parameter 1 is"),
        ("dtype", "rank 3 is refused: its parameters differ from rank 0's, float64 instead"),
        ("weights", "the weights of rank 3 differ from rank 0's at the start; set the same seed"),
        ("settings", "rank 3 was given other settings than rank 0; pass the same arguments"),
        ("servers", "servers must be in .1, 3., got 4; of 4 ranks at least one must be a worker"),
        ("slices", "servers must be at most the 2 parameters there are to slice, got 3"),
        ("resume", "no valid checkpoint in /nowhere; pass the folder given as checkpoint_dir"),
    ],
)
def test_ranks_that_disagree_all_raise(pool, case, message):
    for outcome in pool.run(runs.disagree, case, timeout=30):
        assert outcome is not None
        assert re.search(message, outcome), outcome


def test_roles_do_not_mix(pool):
    told = pool.run(runs.wrong_calls, timeout=30)
    assert "step() is for workers; server ranks call serve()" in told[0]
    assert "serve() is for server ranks; workers call step() and finish()" in told[1]


def test_fewer_than_two_ranks():
    from hvd_ext.async_ps.plan import Plan

    with pytest.raises(ValueError, match=r"at least 2 ranks.*got 1; start the program with mpirun"):
        Plan(1, 1, 10)
    with pytest.raises(ValueError, match="no trainable parameter"):
        Plan(2, 1, 0)
    sizes = [part.stop - part.start for part in Plan(5, 3, 11).slices]
    assert sizes == [4, 4, 3]

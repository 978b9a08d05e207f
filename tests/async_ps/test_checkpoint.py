"""The servers' state: saved, loaded and gone on from, bit for bit."""

import json

import numpy as np
import pytest

from hvd_ext.async_ps import Checkpoint, Report
from hvd_ext.async_ps.checkpoint import finalize_checkpoint, save_shard
from hvd_ext.async_ps.config import ServerSettings
from hvd_ext.async_ps.plan import Plan
from hvd_ext.async_ps.sequencer import Sequencer
from hvd_ext.async_ps.shard import Shard
from hvd_ext.checkpoint.files import DamagedCheckpointError, checkpoint_dir
from hvd_ext.reducers.delay_compensation.update_rules import AsyncRule
from tests.async_ps import runs

SHAPES = [(4, 5), (3,)]
N = 23


def settings(folder=None, **changes):
    given = {"rule": AsyncRule(name="dc-asgd-a"), "lr": 0.1, "momentum": "auto", "prefetch": True,
             "checkpoint_dir": folder, **changes}
    return ServerSettings(**given)


def trained(folder, updates=20, servers=2, **changes):
    """Two servers' slices and the books after some updates of three workers."""
    plan = Plan(3 + servers, servers, N)
    told = settings(folder, **changes)
    books = Sequencer(told, plan, 4)
    rng = np.random.default_rng(0)
    w = rng.normal(size=N).astype(np.float32)
    shards = [Shard(w[part], told, 3) for part in plan.slices]
    for _ in range(updates):
        g = rng.normal(size=N).astype(np.float32)
        order = books.commit_push(int(rng.integers(3)))
        for shard, part in zip(shards, plan.slices, strict=True):
            shard.commit_update(order, g[part])
    return plan, told, books, shards


def save(folder, plan, told, books, shards, run="this run"):
    there = checkpoint_dir(folder, books.update)
    marks = {server: save_shard(there, server, plan.servers, shard.state_dict())
             for server, shard in enumerate(shards)}
    finalize_checkpoint(there, plan, told, books.state_dict(), books.recording, marks, run=run,
                        dtype="float32",
                        shapes=SHAPES)
    return there


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_everything_comes_back_bit_for_bit_on_any_number_of_servers(tmp_path, servers):
    plan, told, books, shards = trained(tmp_path)
    save(tmp_path, plan, told, books, shards)
    saved = Checkpoint(tmp_path)
    again = Plan(3 + servers, servers, N)
    saved.check_compatible(again, told, dtype="float32", shapes=SHAPES)
    loaded = []
    for part in again.slices:
        shard = Shard(np.zeros(part.stop - part.start, np.float32), told, 3)
        shard.load_state_dict(saved.read_state(part), reset_workers=False)
        loaded.append(shard.state_dict())
    before = [shard.state_dict() for shard in shards]
    assert {"w", "velocity", "w_bak.2.1", "mean_square.0"} <= set(before[0])
    for name in before[0]:
        np.testing.assert_array_equal(np.concatenate([state[name] for state in loaded]),
                                      np.concatenate([state[name] for state in before]))
    fresh = Sequencer(told, again, 4)
    fresh.load_state_dict(json.loads(json.dumps(saved.manifest["books"])), saved.read_recording(),
                          reset_workers=False)
    assert fresh.state_dict() == books.state_dict()
    for name in ("delays", "senders", "batches", "lr", "momentum"):
        np.testing.assert_array_equal(getattr(fresh.recording, name),
                                      getattr(books.recording, name))
    assert fresh.commit_push(1) == books.commit_push(1)
    weights = saved.read_weights()
    assert [array.shape for array in weights] == SHAPES
    np.testing.assert_array_equal(runs.flat(weights), np.concatenate([s["w"] for s in before]))


def test_without_a_manifest_the_one_before_counts(tmp_path):
    for updates in (5, 10, 15):
        state = trained(tmp_path, updates)
        save(tmp_path, *state)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "update-000000000010", "update-000000000015"]  # keep=2
    (checkpoint_dir(tmp_path, 15) / "manifest.json").unlink()
    assert Checkpoint(tmp_path).update == 10
    with pytest.raises(FileNotFoundError, match="no valid checkpoint"):
        Checkpoint(checkpoint_dir(tmp_path, 15))


def test_only_valid_checkpoints_of_this_run_are_removed(tmp_path):
    save(tmp_path, *trained(tmp_path, 2), run="another run")
    save(tmp_path, *trained(tmp_path, 10, keep=1))
    checkpoint_dir(tmp_path, 15).mkdir()  # a crash left it: no manifest
    save(tmp_path, *trained(tmp_path, 12, keep=1))
    assert sorted(int(path.name[-12:]) for path in tmp_path.iterdir()) == [2, 12, 15]
    assert Checkpoint(tmp_path).update == 12


def test_the_checkpoint_just_sealed_is_never_removed(tmp_path):
    save(tmp_path, *trained(tmp_path, 10, keep=1))
    save(tmp_path, *trained(tmp_path, 5, keep=1))  # the run went on from an older one
    assert checkpoint_dir(tmp_path, 5).exists()


@pytest.mark.parametrize("name", ["shard-1-of-2.npz", "recording.npz", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "alter", "remove"])
def test_damaged_file_is_refused_by_its_name(tmp_path, name, damage):
    path = save(tmp_path, *trained(tmp_path)) / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
        error = FileNotFoundError if name == "manifest.json" else DamagedCheckpointError
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data[:-7] if damage == "cut" else data)
        error = DamagedCheckpointError

    def read():
        saved = Checkpoint(tmp_path)
        saved.read_state()
        saved.read_recording()

    with pytest.raises(error, match=None if error is FileNotFoundError else name):
        read()


@pytest.mark.parametrize(
    ("workers", "changes", "message"),
    [
        (2, {}, "state per worker that does not fit .workers 3, now 2.*reset_workers=True"),
        (3, {"prefetch": False}, "depth 2, now 1"),
        (3, {"rule": AsyncRule(name="asgd")}, "rule dc-asgd-a, now asgd"),
        (3, {"momentum": 0.0}, "momentum=0 would drop; pass the momentum it was trained with"),
    ],
)
def test_state_that_does_not_fit_is_refused(tmp_path, workers, changes, message):
    save(tmp_path, *trained(tmp_path))
    saved = Checkpoint(tmp_path)
    with pytest.raises(ValueError, match=message):
        saved.check_compatible(Plan(workers + 1, 1, N), settings(tmp_path, **changes), dtype="float32",
                               shapes=SHAPES)
    with pytest.raises(ValueError, match="build the model that was saved"):
        saved.check_compatible(Plan(4, 1, N), settings(tmp_path), dtype="float64", shapes=SHAPES)


def test_reset_workers_keeps_weights_and_velocity(tmp_path):
    plan, told, books, shards = trained(tmp_path)
    save(tmp_path, plan, told, books, shards)
    saved = Checkpoint(tmp_path)
    now = settings(tmp_path, reset_workers=True, rule=AsyncRule(name="dc-asgd-c"))
    two = Plan(3, 1, N)
    saved.check_compatible(two, now, dtype="float32", shapes=SHAPES)
    shard = Shard(np.zeros(N, np.float32), now, 2)
    shard.load_state_dict(saved.read_state(), reset_workers=True)
    whole = np.concatenate([s.w for s in shards])
    np.testing.assert_array_equal(shard.w, whole)
    np.testing.assert_array_equal(shard.velocity, np.concatenate([s.velocity for s in shards]))
    np.testing.assert_array_equal(shard.w_bak[1][0], whole)
    fresh = Sequencer(now, two, 4)
    fresh.load_state_dict(saved.manifest["books"], saved.read_recording(), reset_workers=True)
    assert fresh.update == books.update
    assert fresh.commit_push(0).delay == 0


@pytest.mark.distributed
@pytest.mark.idle_ranks
@pytest.mark.parametrize("prefetch", [False, True])
def test_one_worker_goes_on_as_if_nothing_had_happened(pool, tmp_path, prefetch):
    options = {"lr": 0.02, "rule": "dc-asgd-a", "lam": 0.5, "momentum": 0.5,
               "prefetch": prefetch}
    through = pool.run(runs.train_some, options, 60, 2, "float32")[0]["weights"]
    saving = {**options, "checkpoint_dir": tmp_path, "checkpoint_every": 10, "keep": 99}
    pool.run(runs.train_some, saving, 40, 2, "float32")
    assert len(list(tmp_path.iterdir())) == 4
    again = {**options, "resume": checkpoint_dir(tmp_path, 30)}
    told = pool.run(runs.train_some, again, 60, 2, "float32")[0]
    np.testing.assert_array_equal(told["weights"], through)
    assert told["report"].updates == 60
    assert len(told["recording"]) == 60


def test_report_survives_its_journey():
    _, _, books, _ = trained(None)
    report = books.report()
    assert Report.from_json(report.to_json()) == report
    assert report.updates == 20
    assert sum(worker.updates for worker in report.workers) == 20
    assert report.delay.maximum == len(report.delay.histogram) - 1
    assert report.delay.mean == pytest.approx(
        sum(tau * count for tau, count in enumerate(report.delay.histogram)) / 20)
    assert report.bytes_pushed == 20 * N * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr must be in .0, inf., got 0.0; pass a number above 0"),
        ({"momentum": 1.0}, "momentum must be in .0, 1., got 1.0; pass a number in .0, 1. or"),
        ({"momentum": "more"}, "momentum must be one of 'auto'; got 'more'"),
        ({"updates_per_epoch": 10}, "updates_per_epoch=10 needs lr to be a function.*got lr="),
        ({"checkpoint_every": 10}, "checkpoint_every=10 needs checkpoint_dir; pass a folder"),
        ({"worker_timeout": 0}, "worker_timeout must be in .* seconds; None waits for ever"),
        ({"keep": 0}, "keep must be at least 1"),
    ],
)
def test_bad_settings_say_what_to_do(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.distributed
@pytest.mark.idle_ranks
def test_used_folder_is_refused_unless_the_run_goes_on_from_it(pool, tmp_path):
    options = {"lr": 0.02, "rule": "asgd", "checkpoint_dir": tmp_path, "checkpoint_every": 10, "keep": 9}
    pool.run(runs.train_some, options, 30, 2, "float32")
    names = sorted(path.name for path in tmp_path.iterdir())
    said = pool.run(runs.refused, options, 2)
    assert all("holds the checkpoints of another run" in text for text in said), said
    older = {**options, "resume": checkpoint_dir(tmp_path, 10)}
    said = pool.run(runs.refused, older, 2)
    assert all("resume from it, or write to an empty folder" in text for text in said), said
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    pool.run(runs.train_some, {**options, "resume": tmp_path}, 40, 2, "float32")
    assert set(names) < {path.name for path in tmp_path.iterdir()}

"""Ranks that die, hang or fail: nothing is lost, nothing is applied half, nothing hangs."""

import signal

import numpy as np
import pytest

from hvd_ext.async_ps import Checkpoint
from hvd_ext.reducers.delay_compensation.engine import replay
from hvd_ext.reducers.delay_compensation.update_rules import AsyncRule
from tests.async_ps.program import run_program
from tests.async_ps.runs import flat, gradient, start

pytestmark = [pytest.mark.distributed, pytest.mark.idle_ranks]
OPTIONS = {"lr": 0.02, "rule": "dc-asgd-c", "lam": 0.3}


def replayed(recording, steps=None):
    """The weights the engine reaches with the recorded delays."""
    return replay(
        lambda w, k: gradient(w, int(recording.senders[k]), int(recording.batches[k])),
        flat(start()), steps=len(recording) if steps is None else steps, delays=recording,
        lr=0.02, rule=AsyncRule(name="dc-asgd-c", lam=0.3),
    ).weights


def check_left_out(ended, servers, why, *, lost=1):
    """The others finished, on weights made of whole updates only."""
    ranks = sorted(ended.outcomes)
    dead = ranks[-lost:]
    told = ended.outcomes[0]
    assert told.state == "returned", (told, ended.output)
    report = told.value["report"]
    assert why in report.workers[2].left_out
    assert report.workers[2].updates == 5
    assert [worker.updates for worker in report.workers[:2]] == [40, 40]
    np.testing.assert_array_equal(told.value["weights"], replayed(told.value["recording"]))
    for rank in ranks:
        if rank not in dead:
            assert ended.outcomes[rank].state == "returned", ended.outcomes[rank]
            np.testing.assert_array_equal(ended.outcomes[rank].value["weights"],
                                          told.value["weights"])
    assert f"worker 2 (rank {servers + 2}) is left out after 5 updates" in ended.output


@pytest.mark.parametrize("servers", [1, 2])
def test_killed_worker_is_left_out(tmp_path, servers):
    ended = run_program(tmp_path / "p", "killed", servers + 3, {**OPTIONS, "servers": servers}, 40)
    assert ended.status == 0, ended.output
    check_left_out(ended, servers, "its process ended")


def test_half_a_push_is_never_applied(tmp_path):
    ended = run_program(tmp_path / "p", "killed_with_half_a_push_sent", 5,
                        {**OPTIONS, "servers": 2}, 40)
    assert ended.status == 0, ended.output
    check_left_out(ended, 2, "its process ended")


@pytest.mark.parametrize("flags", [
    [], ["--mca", "btl", "tcp,self"],
], ids=["shared memory", "tcp"])
def test_worker_killed_within_a_large_push(tmp_path, flags):
    ended = run_program(tmp_path / "p", "killed_within_a_large_push", 4,
                        {"lr": 0.5, "rule": "asgd"}, mpirun_args=["--enable-recovery", *flags])
    assert ended.status == 0, ended.output
    report, values = ended.outcomes[0].value
    assert report.workers[2].left_out == "its process ended"
    assert report.updates in (15, 16)  # with the last push of the dead worker whole, or without
    np.testing.assert_array_equal(values, [-0.5 * report.updates])


def test_hung_worker_is_left_out(tmp_path):
    ended = run_program(tmp_path / "p", "hung", 4, {**OPTIONS, "worker_timeout": 1.5}, 40,
                        until=[0, 1, 2])
    assert ended.status is None  # mpirun itself waits for the process that hangs; see the docs
    check_left_out(ended, 1, "silent for")


def test_worker_that_comes_back_too_late_is_told(tmp_path):
    ended = run_program(tmp_path / "p", "late", 4, {**OPTIONS, "worker_timeout": 1.0}, 40)
    check_left_out(ended, 1, "silent for")
    assert ended.outcomes[3].state == "raised"
    assert "WorkerEvicted: worker 2 (rank 3) was left out" in ended.outcomes[3].value
    assert "raise it, or call ping()" in ended.outcomes[3].value


def test_worker_with_an_error_of_its_own_is_left_out(tmp_path):
    ended = run_program(tmp_path / "p", "failing", 4, OPTIONS, 40)
    assert "ZeroDivisionError" in ended.outcomes[3].value
    report = ended.outcomes[0].value
    assert report.workers[2].left_out == "it left with an error of its own"
    assert report.updates == 85


def test_without_workers_the_server_ends_with_an_error(tmp_path):
    ended = run_program(tmp_path / "p", "all_killed", 4,
                        {**OPTIONS, "checkpoint_dir": tmp_path / "c"}, 40)
    assert ended.status is not None  # it ended by itself
    assert "no worker is left after 18 updates; start again with" in ended.outcomes[0].value
    assert Checkpoint(tmp_path / "c").update == 18


@pytest.mark.parametrize(("servers", "lost"), [(1, 0), (2, 0), (2, 1)])
def test_lost_server_ends_everything_and_leaves_a_checkpoint(tmp_path, servers, lost):
    options = {**OPTIONS, "servers": servers, "checkpoint_dir": tmp_path / "c",
               "checkpoint_every": 20}
    ended = run_program(tmp_path / "p", "server_killed", servers + 2, options, 10**6, lost)
    assert ended.seconds < 25
    assert ended.outcomes[lost].state == "died"
    for rank, outcome in ended.outcomes.items():
        if rank != lost:
            assert outcome.state == "raised", outcome
            assert outcome.value.startswith("ServerLost"), outcome
            assert "start again with resume=" in outcome.value
    assert check_checkpoint(tmp_path / "c").update % 20 == 0


def test_hung_server_is_an_error_on_the_workers(tmp_path):
    options = {**OPTIONS, "server_timeout": 1.5}
    ended = run_program(tmp_path / "p", "server_signalled", 3, options, 10**6, 0,
                        int(signal.SIGSTOP), until=[1, 2])
    for rank in (1, 2):
        assert ended.outcomes[rank].value.startswith(
            "ServerLost: a parameter server did not answer within 1.5 s; there is no checkpoint")


def test_hung_primary_is_an_error_on_the_other_server_too(tmp_path):
    options = {**OPTIONS, "servers": 2, "server_timeout": 2.0}
    ended = run_program(tmp_path / "p", "server_signalled", 4, options, 10**6, 0, int(signal.SIGSTOP),
                        until=[1, 2, 3])
    assert ended.outcomes[1].value.startswith(
        "ServerLost: the primary server (rank 0) said nothing for 2 s (server_timeout)"), ended.outcomes[1]
    for rank in (2, 3):
        assert ended.outcomes[rank].value.startswith("ServerLost"), ended.outcomes[rank]


@pytest.mark.parametrize("every", [None, 20], ids=["training", "while it should save"])
def test_hung_second_server_is_named_and_no_worker_is_blamed(tmp_path, every):
    options = {**OPTIONS, "servers": 2, "server_timeout": 3.0, "worker_timeout": 1.0,
               "checkpoint_dir": tmp_path / "c", "checkpoint_every": every}
    ended = run_program(tmp_path / "p", "server_signalled", 4, options, 10**6, 1,
                        int(signal.SIGSTOP), until=[0, 2, 3])
    for rank in (0, 2, 3):
        assert ended.outcomes[rank].value.startswith("ServerLost"), ended.outcomes[rank]
    assert "server rank 1 " in ended.outcomes[0].value
    assert "server_timeout" in ended.outcomes[0].value
    assert "left out" not in ended.output


def test_hung_worker_is_left_out_of_two_servers(tmp_path):
    options = {**OPTIONS, "servers": 2, "worker_timeout": 1.5, "server_timeout": 6.0}
    ended = run_program(tmp_path / "p", "hung", 5, options, 40, until=[0, 1, 2, 3])
    check_left_out(ended, 2, "silent for")


@pytest.mark.parametrize("rank", [0, 1])
def test_full_disk_ends_everything_with_its_reason(tmp_path, rank):
    options = {**OPTIONS, "servers": 2, "checkpoint_dir": tmp_path / "c", "checkpoint_every": 20}
    ended = run_program(tmp_path / "p", "disk_full", 4, options, 10**6, rank)
    for outcome in ended.outcomes.values():
        assert outcome.state == "raised", outcome
        assert "No space left on device" in outcome.value, outcome
    assert check_checkpoint(tmp_path / "c").update == 20
    assert not list((tmp_path / "c").rglob("*.part"))


def check_checkpoint(folder):
    """It holds what the delays recorded in it lead to."""
    saved = Checkpoint(folder)
    assert saved.update >= 20
    np.testing.assert_array_equal(flat(saved.read_weights()), replayed(saved.read_recording()))
    return saved


def test_interrupted_mpirun_leaves_a_checkpoint_to_go_on_from(tmp_path):
    options = {**OPTIONS, "checkpoint_dir": tmp_path / "c"}
    ended = run_program(
        tmp_path / "p", "endless", 3, options, str(tmp_path / "flag"),
        interrupt_after=str(tmp_path / "flag"),
        mpirun_args=["--enable-recovery", "--mca", "odls_base_sigkill_timeout", "4"],
    )
    assert ended.status not in (0, None)
    saved = check_checkpoint(tmp_path / "c")
    steps = saved.update + 10
    again = run_program(tmp_path / "q", "trained", 3, {**options, "resume": tmp_path / "c"}, steps)
    told = again.outcomes[0].value
    assert told["report"].updates == 2 * steps
    np.testing.assert_array_equal(told["weights"], replayed(told["recording"]))


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_interrupted_server_stops_everybody_after_a_checkpoint(tmp_path, rank, number):
    options = {**OPTIONS, "servers": 2, "checkpoint_dir": tmp_path / "c"}
    ended = run_program(tmp_path / "p", "server_signalled", 4, options, 10**6, rank, int(number))
    check_checkpoint(tmp_path / "c")
    said = f"stopped by {number.name} after"
    wanted = ["KeyboardInterrupt" if number == signal.SIGINT else "SystemExit",
              *["ServerStopped"] * 3]
    for outcome, kind in zip(ended.outcomes.values(), wanted, strict=True):
        assert outcome.state == "raised", outcome
        assert outcome.value.startswith(kind)
        assert said in outcome.value or kind == "SystemExit"


def test_failing_schedule_ends_everything(tmp_path):
    ended = run_program(tmp_path / "p", "failing_schedule", 4, {"rule": "asgd"}, 40)
    for outcome in ended.outcomes.values():
        assert outcome.state == "raised"
        assert "lr at update 20 must be in" in outcome.value


def test_a_rank_that_never_comes_is_an_error_not_a_hang(tmp_path):
    ended = run_program(tmp_path / "p", "one_rank_stays_away", 4)
    for rank in range(3):
        assert "not all ranks constructed ParameterServer within 2 s" in ended.outcomes[rank].value

"""The fixture that starts ranks: results by rank, the failing rank's traceback, no hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import (
    ROOT,
    RankFailure,
    Ranks,
    command_of,
    environment_of_ranks,
    own_rank,
    run_ranks,
)

pytestmark = pytest.mark.distributed


def mean_of_ranks(scale):
    import horovod.torch as hvd
    import torch

    return float(hvd.allreduce(torch.tensor(scale * hvd.rank()), name="mean"))


def fail_on(rank):
    if own_rank() == rank:
        raise ValueError(f"planted on rank {rank}")
    time.sleep(30)


def die_on(rank):
    if own_rank() == rank:
        os._exit(3)
    time.sleep(30)


def sleep(seconds):
    time.sleep(seconds)


def test_results_come_by_rank(ranks):
    assert ranks(2).run(mean_of_ranks, 10.0) == [5.0, 5.0]
    assert ranks(2).run(own_rank) == [0, 1]


def test_gloo_launcher():
    assert run_ranks(mean_of_ranks, 2, 10.0, launcher="gloo") == [5.0, 5.0]


def test_failing_rank_is_named_with_its_traceback():
    with pytest.raises(RankFailure, match=r"(?s)rank 1 raised.*planted on rank 1"):
        run_ranks(fail_on, 2, 1, init=None)


def test_silent_ranks_are_killed_and_show_where_they_stood():
    with Ranks(2, init=None) as ranks:
        ranks.run(own_rank)
        with pytest.raises(RankFailure, match=r"(?s)rank 0 silent.*in sleep"):
            ranks.run(sleep, 60, timeout=3)
        assert not ranks.alive


def test_dead_rank_ends_the_others():
    outcomes = run_ranks(die_on, 2, 1, init=None, check=False)
    assert [outcome.state for outcome in outcomes] == ["died", "died"]


def hash_of_a_name():
    return hash("layer.weight")


def test_forked_ranks_order_sets_differently(ranks):
    assert len(set(ranks(2).run(hash_of_a_name))) == 2


def as_it_ends(how):
    """A rank of its own, forked from PyTorch's server: what its launcher sees."""
    environment = environment_of_ranks(HVD_EXT_ENDS=how)
    command = command_of("torch", "tests.core.ending_program", how, environment=environment)
    if command[:3] != [sys.executable, "-I", "-S"]:
        pytest.skip("ranks cannot be forked here")
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("how", "status", "said"), [
    ("return", 0, "the end\n"), ("exit", 3, ""), ("raise", 1, "ValueError: planted"), ("kill", -9, ""),
    ("abort", -6, ""),
])
def test_a_forked_rank_ends_as_it_would_alone(how, status, said):
    done = as_it_ends(how)
    assert done.returncode == status, done
    assert said in done.stdout + done.stderr


def test_a_rank_without_its_stub_is_killed(tmp_path):
    environment = environment_of_ranks(HVD_EXT_ENDS="sleep", HVD_EXT_PID=str(tmp_path / "pid"))
    command = command_of("torch", "tests.core.ending_program", "sleep", environment=environment)
    if command[:3] != [sys.executable, "-I", "-S"]:
        pytest.skip("ranks cannot be forked here")
    stub = subprocess.Popen(command, cwd=ROOT, env=environment)
    while not (tmp_path / "pid").exists():
        assert stub.poll() is None
        time.sleep(0.01)
    pid = int((tmp_path / "pid").read_text())
    stub.kill()
    stub.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the rank lives on"
        time.sleep(0.01)


def test_another_environment_is_imported_under():
    environment = environment_of_ranks(KERAS_BACKEND="torch")
    assert command_of("torch", "a.module", environment=environment) == [sys.executable, "-m", "a.module"]
    assert command_of(None, "a.module", environment=environment_of_ranks())[1] == "-m"

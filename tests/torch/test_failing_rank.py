"""An exception on one rank ends the others, with an error that names it, long before any time limit."""

from __future__ import annotations

import subprocess

import pytest

from tests.ranks import ROOT, command_of, environment_of_ranks, kill_tree, launch_command

pytestmark = pytest.mark.ranks


def run(how, method, launcher):
    environment = environment_of_ranks(HVD_EXT_TIMEOUT="600")
    command = command_of("torch", "tests.torch.failing_program", how, method, environment=environment)
    process = subprocess.Popen(launch_command(2, command, launcher), cwd=ROOT, env=environment, text=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        output, _ = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        raise
    return process.returncode, output


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_an_exception_ends_all_ranks_and_is_named(launcher):
    status, output = run("raise", "plain", launcher)
    assert status != 0, output
    assert output.count("rank 1 failed: ZeroDivisionError: a bug of one rank; its traceback:") == 1, output
    assert "rank 0 ends because rank 1 failed: ZeroDivisionError: a bug of one rank" in output, output
    assert sum(line.rstrip().endswith("ZeroDivisionError: a bug of one rank")
               for line in output.splitlines() if "failed" not in line) == 1, output


def test_join_with_an_extension():
    status, output = run("join", "topk", "mpirun")
    assert status != 0, output
    assert "put the loop over the batches into `with hvd.uneven(optimizer):`" in output, output
    assert "rank 0 ends because rank 1 failed: RuntimeError" in output, output

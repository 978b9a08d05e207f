"""An exception on one rank ends the others, with an error that names it, long before any time limit.

A script that catches the error of a wait that was given up, and ends normally, ends with status 70.
"""

from __future__ import annotations

import pytest

from hvd_ext.watchdog.watchdog import EXIT_STATUS
from tests.ranks import run_program

pytestmark = pytest.mark.distributed
PROGRAM = "tests.torch.failing_program"


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_an_exception_ends_all_ranks_and_is_named(launcher):
    status, output = run_program(PROGRAM, "raise", "plain", framework="torch", launcher=launcher,
                                 HVD_EXT_TIMEOUT="600")
    assert status != 0, output
    assert output.count("rank 1 failed: ZeroDivisionError: a bug of one rank; its traceback:") == 1, output
    assert "rank 0 ends because rank 1 failed: ZeroDivisionError: a bug of one rank" in output, output
    assert sum(line.rstrip().endswith("ZeroDivisionError: a bug of one rank")
               for line in output.splitlines() if "failed" not in line) == 1, output


ENDINGS = [(how, launcher) for launcher in ("mpirun", "gloo") for how in ("end", "exit", "shutdown", "_exit")
           if (how, launcher) != ("_exit", "mpirun")]  # mpirun calls a rank failed that has not finalised MPI


@pytest.mark.idle_ranks
@pytest.mark.parametrize(("how", "launcher"), ENDINGS)
def test_a_script_that_catches_the_error_and_ends(how, launcher):
    status, output = run_program(PROGRAM, how, "sharded", framework="torch", launcher=launcher,
                                 HVD_EXT_TIMEOUT="3,60")
    assert "rank 0 caught: rank 0 has waited" in output, output
    if how == "_exit":
        assert status == 0, output
    elif launcher == "mpirun":
        assert status == EXIT_STATUS, output
    else:
        assert f"Exit code: {EXIT_STATUS}" in output, output

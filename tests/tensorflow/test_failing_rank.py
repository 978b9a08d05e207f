"""A script that catches the error of a wait that was given up, and ends normally, ends with status 70."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

from hvd_ext.watchdog.watchdog import EXIT_STATUS
from tests.ranks import run_program

pytestmark = [pytest.mark.distributed, pytest.mark.idle_ranks]


@pytest.mark.parametrize(("how", "launcher"), [
    ("end", "mpirun"), ("exit", "mpirun"), ("shutdown", "mpirun"), ("end", "gloo"), ("_exit", "gloo")])
def test_a_script_that_catches_the_error_and_ends(how, launcher):
    status, output = run_program("tests.tensorflow.failing_program", how, "sharded", framework="tensorflow",
                                 launcher=launcher, HVD_EXT_TIMEOUT="3,60")
    assert "rank 0 has waited" in output, output
    assert "rank 0 caught:" in output, output
    if how == "_exit":
        assert status == 0, output
    elif launcher == "mpirun":
        assert status == EXIT_STATUS, output
    else:
        assert f"Exit code: {EXIT_STATUS}" in output, output

"""With ``overlap=`` a rank that ends after its last step waits for those that have yet to take theirs."""

from __future__ import annotations

import pytest

from tests.ranks import run_program

pytestmark = pytest.mark.distributed
PROGRAM = "tests.torch.leaving_program"


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
@pytest.mark.parametrize(("how", "method"), [("end", "plain"), ("shutdown", "plain"), ("drop", "plain"),
                                             ("shutdown", "fp16")])
def test_all_ranks_end_without_an_error(how, method, launcher, tmp_path):
    status, output = run_program(PROGRAM, how, method, str(tmp_path), framework="torch", launcher=launcher)
    assert status == 0, output
    assert "HorovodInternalError" not in output, output

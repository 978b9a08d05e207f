"""What is printed into a log has no escape codes, whatever the environment says of colours."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hvd_ext.seng.report import make_report
from hvd_ext.seng.settings import Settings
from tests.ranks import ROOT, environment_of_ranks, launch_command


@pytest.mark.parametrize("variables", [
    {}, {"FORCE_COLOR": "1"}, {"TERM": "xterm-256color", "COLORTERM": "truecolor"}], ids=str)
def test_a_report_is_text(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    layer = {"layer": "0", "kind": "Linear", "bytes": 8, "formula_bytes": 8, "failures": 0}
    printed = str(make_report([layer], Settings(damping=0.2), step=1, ranks=2, skipped=0,
                              identity_parameters=3))
    assert "Linear" in printed
    assert "\x1b" not in printed


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "command"), [
    (3, ["examples.async_digits", "--epochs", "1"]), (1, ["examples.torch_digits", "--epochs", "1"])],
    ids=["parameter server", "example"])
def test_progress_in_a_log_is_lines(size: int, command: list[str]) -> None:
    done = subprocess.run(launch_command(size, [sys.executable, "-m", *command]), cwd=ROOT,
                          env=environment_of_ranks(), stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "updates/s" in done.stdout or "Digits, op=average" in done.stdout

"""The script that tries versions: it resumes, says what it could not run, and writes one table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from hvd_ext.cli.horovod_source import patch_id
from scripts import version_matrix
from scripts.version_matrix import (
    BEGIN,
    END,
    Combination,
    Result,
    attempt,
    find_python,
    judged,
    run,
    table,
    write,
)

BOTH = Combination("3.11", "2.13.0", "2.21.0")
TORCH = Combination("3.12", "2.15.0", "none")


def report(**levels: str) -> str:
    rows = {"PyTorch": "2.15.0+cu130 (CUDA 13.0, 0 GPU); tested with 2.13.0",
            "Self-test PyTorch": "allreduce"}
    return json.dumps({"findings": [
        {"subject": subject, "value": value,
         "level": levels.get(subject.replace("-", "_").replace(" ", "_"), "ok")}
        for subject, value in rows.items()]})


def test_combinations_from_the_command_line() -> None:
    assert Combination.of("3.11,2.13.0,2.21.0") == BOTH
    assert BOTH.frameworks == ["torch==2.13.0", "tensorflow-cpu==2.21.0"]
    assert TORCH.frameworks == ["torch==2.15.0"]
    for text in ("3.11,2.13.0", "3.11,none,none", "3.11,,none"):
        with pytest.raises(argparse.ArgumentTypeError, match="PYTHON,TORCH,TENSORFLOW"):
            Combination.of(text)


def test_every_combination_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Combination] = []

    def one(combination: Combination, folder: Path) -> Result:
        if len(tried) == 1:
            tried.append(combination)
            raise KeyboardInterrupt
        tried.append(combination)
        return Result(combination, patch_id(), "yes", "yes")

    with pytest.raises(KeyboardInterrupt):
        run([TORCH, BOTH], tmp_path, one=one)
    results = run([TORCH, BOTH], tmp_path, one=one)  # goes on where it stopped
    assert tried == [TORCH, BOTH, BOTH]
    assert [result.combination for result in results] == [BOTH, TORCH]
    run([TORCH], tmp_path, one=one, again=True)
    assert tried[3:] == [TORCH]
    monkeypatch.setattr(version_matrix, "patch_id", lambda: "other edits")
    run([TORCH], tmp_path, one=one)
    assert tried[4:] == [TORCH]


def test_a_python_that_is_not_here_is_said_not_hidden(tmp_path: Path) -> None:
    result = attempt(Combination("3.1", "2.13.0", "none"), tmp_path)
    assert (result.built, result.ran, result.reason) == ("not run", "not run", "no Python 3.1 here")
    assert list(tmp_path.iterdir()) == []
    assert find_python(f"{sys.version_info[0]}.{sys.version_info[1]}") is not None


@pytest.mark.parametrize(
    ("text", "ran", "reason"),
    [
        (report(), "yes", ""),
        (report(Self_test_PyTorch="problem"), "no", "Self-test PyTorch: allreduce"),
        (report(Self_test_PyTorch="note"), "no", ""),
        ("Traceback", "no", "the doctor gave no report"),
    ],
)
def test_only_a_self_test_that_passed_counts_as_run(text: str, ran: str, reason: str) -> None:
    result = judged(TORCH, "edits", text, 60.0)
    assert (result.built, result.ran, result.reason) == ("yes", ran, reason)


def test_table_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    failed = Result(BOTH, "e", "no", "not run", "error: a | b\nc")
    write(page, table([failed, judged(TORCH, "e", report(), 60.0)]))
    assert page.read_text() == f"""before
{BEGIN}
| Python | PyTorch | TensorFlow | built | two ranks | |
|---|---|---|---|---|---|
| 3.11 | 2.13.0 | 2.21.0 | no | not run | error: a / b c |
| 3.12 | 2.15.0+cu130 | - | yes | yes |  |
{END}
after
"""
    page.write_text(f"{END} {BEGIN}")
    with pytest.raises(ValueError, match="once each, in this order"):
        write(page, "")


def test_a_failing_step_names_its_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = "raise SystemExit('error: there is no such version')"
    with pytest.raises(version_matrix.StepFailed, match="error: there is no such version"):
        version_matrix._step([sys.executable, "-c", program], log)
    assert "SystemExit" in log.read_text()

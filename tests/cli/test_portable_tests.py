"""The script that runs tests as other machines would: its command lines, its table, its exit status."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from scripts.portable_tests import (
    CONFIGURATIONS,
    Run,
    busy_loop,
    cpu_flags,
    fallen,
    main,
    read_report,
    table,
)


def test_command_lines() -> None:
    report = Path("/x/r.xml")
    plain = CONFIGURATIONS["plain"].command(3, ["tests/core", "-m", "not distributed"], report)
    assert plain[:3] == [sys.executable, "-m", "pytest"]
    assert plain[-4:] == [f"--junitxml={report}", "tests/core", "-m", "not distributed"]
    assert CONFIGURATIONS["one-core"].command(3, [], report) == [
        "taskset", "-c", "3", *plain[:-3]]
    assert CONFIGURATIONS["busy"].command(3, [], report) == [
        "taskset", "-c", "3", "nice", "-n", "10", *plain[:-3]]
    assert CONFIGURATIONS["aten-default"].command(3, [], report) == plain[:-3]
    assert CONFIGURATIONS["aten-default"].environment == {"ATEN_CPU_CAPABILITY": "default"}


def test_only_what_the_processor_can_run(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu sse4_1 sse4_2 avx2 fma\n\nprocessor\t: 1\n")
    flags = cpu_flags(info)
    assert flags == {"fpu", "sse4_1", "sse4_2", "avx2", "fma"}
    lacking = {name: one.lacks(flags) for name, one in CONFIGURATIONS.items() if one.lacks(flags)}
    assert lacking == {"openblas-prescott": ["pni"],
                       "openblas-skylakex": ["avx512f", "avx512bw", "avx512dq", "avx512vl"]}


def test_table_counts_what_fell_in_any_run() -> None:
    good = {"a.py::one": "passed", "a.py::two": "passed", "a.py::three": "skipped"}
    runs = [Run("plain", 0, good), Run("plain", 0, good),
            Run("busy", 1, {**good, "a.py::two": "failed"}), Run("busy", 0, good), Run("busy", -9, {})]
    assert table(runs, {"wide": ["avx512f"]}).splitlines()[2:] == [
        "| plain | 2 | 2 | 1 | 0 |  |",
        "| busy | 3 | 1 | 1 | 1 | a.py::two (1)<br>pytest ended with status -9 (1) |",
        "| wide | 0 | | | | not run: the processor lacks avx512f |"]
    assert not fallen(runs[:2])
    # No tests at all, or an error of pytest's own beside tests that passed, is no success.
    assert fallen([Run("plain", 5, {})]) == {"pytest ended with status 5": 1}
    assert fallen([Run("plain", 3, good)]) == {"pytest ended with status 3": 1}


def test_the_busy_loop_ends_with_the_run() -> None:
    core = min(os.sched_getaffinity(0))
    with busy_loop(core) as loop:
        assert loop.poll() is None
        assert os.sched_getaffinity(loop.pid) in ({core}, os.sched_getaffinity(0))  # taskset starts it
    assert loop.poll() is not None


def test_a_report_cut_off_says_nothing(tmp_path: Path) -> None:
    report = tmp_path / "r.xml"
    assert read_report(report) == {}
    report.write_text("<testsuites><testsuite><testcase file='a.py' name='one'/>")
    assert read_report(report) == {}


PROGRAM = """
import os
import pytest

def test_of_any_machine():
    assert "OMP_NUM_THREADS" in os.environ

@pytest.mark.parametrize("size", [1, 2])
def test_of_one_machine(size):
    assert os.environ.get("ATEN_CPU_CAPABILITY") != "default" or size == 1

def test_not_here():
    pytest.skip("never")

@pytest.fixture
def broken():
    yield
    assert "NPY_DISABLE_CPU_FEATURES" not in os.environ

def test_end(broken):
    pass
"""


def test_what_falls_in_one_configuration_is_named(
        tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ATEN_CPU_CAPABILITY", "NPY_DISABLE_CPU_FEATURES"):
        monkeypatch.delenv(variable, raising=False)
    program = tmp_path / "test_program.py"
    program.write_text(PROGRAM)

    def told(*more: str) -> tuple[int, list[str]]:
        status = main([str(program), "--folder", str(tmp_path / "out"), *more])
        return status, capfd.readouterr().out.splitlines()

    status, lines = told("--repeats", "1", "--configurations", "plain", "numpy-baseline", "one-core")
    assert status == 1
    assert lines[-3] == "| plain | 1 | 4 | 1 | 0 |  |"
    assert lines[-2].startswith("| numpy-baseline | 1 | 3 | 1 | 1 | ")
    assert lines[-2].endswith("test_program.py::test_end (1) |")
    assert lines[-1] == "| one-core | 1 | 4 | 1 | 0 |  |"
    status, lines = told("--repeats", "2", "-k", "one_machine", "--configurations", "aten-default",
                         "--", "-x")
    assert status == 1
    assert lines[-1].startswith("| aten-default | 2 | 1 | 0 | 1 | ")
    assert lines[-1].endswith("test_program.py::test_of_one_machine[2] (2) |")
    assert "test_of_one_machine" in (tmp_path / "out" / "aten-default-2.log").read_text()
    status, lines = told("--repeats", "1", "-k", "nothing", "--configurations", "plain")
    assert (status, lines[-1]) == (1, "| plain | 1 | 0 | 0 | 0 | pytest ended with status 5 (1) |")
    with pytest.raises(SystemExit):
        main(["--repeats", "0"])
    assert "--repeats must be at least 1, got 0" in capfd.readouterr().err

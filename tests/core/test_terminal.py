"""Bars and colours are for terminals, and a log of mpirun is none."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_ext.reporting.terminal import is_terminal
from tests.ranks import ROOT, environment_of_ranks, launch_command

SAY = ("import sys; from hvd_ext.reporting.terminal import is_terminal; "
       "sys.stdout.write(str(is_terminal(sys.stdout)))")
DIRECT = [sys.executable, "-c", SAY]
IN_A_SHELL = ["sh", "-c", f"{sys.executable} -c '{SAY}'; true"]
HOROVODRUN = [str(Path(sys.executable).parent / "horovodrun"), "--mpi", "-np", "1", "-H", "localhost:1"]
if os.geteuid() == 0:
    HOROVODRUN.append("--mpi-args=--allow-run-as-root")
COMMANDS = {"alone": DIRECT, "in a shell": IN_A_SHELL, "mpirun": launch_command(1, DIRECT),
            "mpirun and a shell": launch_command(1, IN_A_SHELL), "horovodrun": [*HOROVODRUN, *DIRECT]}


def said_in_a_file(command: list[str], path: Path) -> str:
    with path.open("wb") as file:
        subprocess.run(command, cwd=ROOT, env=environment_of_ranks(), stdout=file, stdin=subprocess.DEVNULL,
                       check=True, timeout=120, start_new_session=True)
    return path.read_text()


def said_on_a_terminal(command: list[str]) -> str:
    person, program = pty.openpty()
    process = subprocess.Popen(command, cwd=ROOT, env=environment_of_ranks(), stdout=program,
                               stdin=subprocess.DEVNULL, start_new_session=True)
    os.close(program)
    said = b""
    while True:
        try:
            part = os.read(person, 4096)
        except OSError:  # nobody has the other end any more
            break
        if not part:
            break
        said += part
    os.close(person)
    assert process.wait(120) == 0
    return said.decode()


@pytest.mark.distributed
@pytest.mark.idle_ranks
@pytest.mark.parametrize("way", COMMANDS)
def test_a_file_is_no_terminal(way: str, tmp_path: Path) -> None:
    said = said_in_a_file(COMMANDS[way], tmp_path / "log")
    assert "False" in said
    assert "True" not in said


@pytest.mark.distributed
@pytest.mark.idle_ranks
@pytest.mark.parametrize("way", ["alone", "in a shell", "mpirun", "mpirun and a shell"])
def test_a_terminal_is_one(way: str) -> None:
    said = said_on_a_terminal(COMMANDS[way])
    assert "True" in said
    assert "False" not in said


def test_what_has_no_file_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert not is_terminal(sys.stdout)


@pytest.mark.distributed
@pytest.mark.idle_ranks
def test_the_launcher_is_what_is_asked(tmp_path: Path) -> None:
    """Open MPI's terminal for the rank is there, which is why nobody may go by it."""
    isatty = [sys.executable, "-c", "import sys; sys.stdout.write(str(sys.stdout.isatty()))"]
    assert "True" in said_in_a_file(launch_command(1, isatty), tmp_path / "log")

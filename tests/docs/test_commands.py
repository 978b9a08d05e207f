"""Command lines of README.md and docs/*.md are accepted by what they call; those that are quick are run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hvd_ext.cli.main import main
from tests.conftest import LEFT_OUT, NEEDS
from tests.docs.blocks import ROOT
from tests.docs.commands import Command, Wrong, find_commands, find_programs, module_files
from tests.ranks import command_of, environment_of_ranks

COMMANDS = find_commands()
IN_BLOCKS = [command for command in COMMANDS if command.block]
# Commands of hvd-ext that are not run here, with the reason.
NOT_RUN = {
    "install-horovod": "it builds Horovod: tests/cli/test_build.py",
    "doctor": "its findings are this machine's: tests/cli/test_doctor.py",
    "launch": "it becomes the launcher: tests/cli/test_launch.py",
    "plan --measure": "it takes a minute on the ranks: tests/cli/test_plan.py",
    "plan --cluster": "it reads what --measure has saved: tests/cli/test_plan.py",
}


def test_there_are_commands_in_blocks_and_in_the_text():
    assert len(IN_BLOCKS) > 30
    assert len(COMMANDS) - len(IN_BLOCKS) > 100


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_is_one(command: Command) -> None:
    find_programs(command)


@pytest.mark.parametrize("text", [
    "python -m benchmarks.no_such", "python examples/no_such.py", "make no-such", "hvd-ext plan --no-such 1",
    "horovodrun --no-such -np 2 true", "mpirun --no-such true", "srun --no-such python train.py",
    "pip install .[no]", "pip install torch==1.0", "pytest tests/no_such.py", "pytest tests/docs -k no_such",
    "make test-soak PYTEST_ARGS=tests/no_such", "mpirun -np 2 python no_such.py"])
def test_a_wrong_command_is_noticed(text: str) -> None:
    with pytest.raises(Wrong):
        find_programs(Command("page:1", tuple(text.split()), True))


def parse_programs(front_end: str, lines: Sequence[Sequence[str]]) -> list[str | None]:
    """What the programs' own parsers say against each line, asked in a process that has the front end."""
    environment = environment_of_ranks()
    command = command_of(front_end, "tests.docs.programs", json.dumps(lines), environment=environment)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    refusals: list[str | None] = json.loads(done.stdout.splitlines()[-1])
    return refusals


def text_of(module: str, imported: bool = True) -> str:
    """A module's source, with that of the modules of this repository which it imports."""
    text = "\n".join(path.read_text() for path in module_files(module))
    if imported:
        names = re.findall(r"^from ((?:examples|benchmarks|scripts)[.\w]*) import", text, re.M)
        text += "\n".join(text_of(name, imported=False) for name in names)
    return text


def front_end_of(module: str) -> str:
    return "tensorflow" if NEEDS["tensorflow"].search(text_of(module)) else "torch"


@pytest.mark.distributed
@pytest.mark.parametrize("front_end", [name for name in NEEDS if name not in LEFT_OUT])
def test_programs_take_their_arguments(front_end: str) -> None:
    lines = sorted({program for command in COMMANDS for program in find_programs(command)})
    lines = [line for line in lines if front_end_of(line[0]) == front_end]
    bare = [line for line in lines if "parse_args(" not in text_of(line[0])]
    assert [line for line in bare if len(line) > 1] == []  # programs without arguments are given none
    lines = [line for line in lines if line not in bare]
    wrong = (*next(line for line in lines if "--help" not in line), "--no-such-option")
    *refusals, noticed = parse_programs(front_end, [*lines, wrong])
    assert {line: said for line, said in zip(lines, refusals, strict=True) if said is not None} == {}
    assert noticed is not None
    assert "--no-such-option" in noticed


def words_of(tool: str) -> list[Command]:
    return [command for command in IN_BLOCKS if command.words[0] == tool]


@pytest.mark.parametrize("command", words_of("hvd-ext"), ids=str)
def test_tool_runs(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = list(command.words[1:])
    for name, reason in NOT_RUN.items():
        if set(name.split()) <= set(arguments) and "--dry-run" not in arguments:
            pytest.skip(reason)
    assert main(arguments) == 0
    assert capsys.readouterr().out


def test_list_of_tools_not_run_names_commands_that_are_there():
    given = [set(command.words) for command in IN_BLOCKS]
    assert {name for name in NOT_RUN if not any(set(name.split()) <= words for words in given)} == set()


@pytest.mark.distributed
@pytest.mark.parametrize("command", words_of("mpirun"), ids=str)
def test_mpirun_takes_its_options(command: Command) -> None:
    """As the page has them, with this machine in place of its hosts and ``true`` as the program.

    Where the program is one of this repository's the ranks are this machine's, and the line runs as it is.
    """
    words = list(command.words)
    ranks = words[words.index("-np") + 1]
    program = next(number for number, word in enumerate(words)
                   if word in ("python", "hvd-ext", "apptainer") or word == "...")
    words = [re.sub(r"^node1:.*", f"localhost:{ranks}", word) for word in words[:program]]
    if not find_programs(command) and "-H" not in words:
        words += ["-H", f"localhost:{ranks}"]
    if os.geteuid() == 0:
        words.append("--allow-run-as-root")
    words[0] = str(Path(sys.executable).parent / "mpirun")
    done = subprocess.run([*words, "true"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

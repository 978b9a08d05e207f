"""Tables of arguments name every argument of their call, no other, and its default."""

from __future__ import annotations

import ast
import json
import subprocess
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from hvd_ext.cli.main import build_parser
from tests.conftest import LEFT_OUT, NEEDS
from tests.docs.blocks import ROOT
from tests.docs.tables import REQUIRED, TABLES, Argument, Table, read_arguments, read_choices
from tests.ranks import command_of, environment_of_ranks

# The call that each table of arguments is of, by page and heading.
CALLS = {
    ("docs/async.md", "Settings"): "ParameterServer",
    ("docs/delay_compensation.md", "Settings"): "DelayCompensated",
    ("docs/delayed_update.md", "Settings"): "DelayedUpdate",
    ("docs/powersgd.md", "PowerSGD: low-rank gradients by allreduce"): "Compression.powersgd",
    ("docs/seng.md", "Arguments"): "SENG",
    ("docs/topk.md", "Settings"): "Compression.topk",
}
# The argument whose values a table lists.
CHOICES = {
    ("docs/async.md", "The rules"): ("ParameterServer", "rule"),
    ("docs/uneven_data.md", "Settings"): ("uneven_inputs", "average_over"),
    ("docs/servers.md", "Where the update runs"): ("DistributedOptimizer", "server"),
}
MODULES = {"torch": "hvd_ext.torch", "tensorflow": "hvd_ext.tensorflow.keras,hvd_ext.tensorflow"}
FRONT_ENDS = [name for name in NEEDS if name not in LEFT_OUT]
OF_ARGUMENTS = [table for table in TABLES if table.head[0] == "argument"]
OF_CHOICES = [table for table in TABLES if table.head[0].startswith("`") and table.head[0].endswith("=`")]


@cache
def taken(front_end: str) -> dict[str, dict[str, Any]]:
    """What each call takes, asked in a process that has the front end."""
    environment = environment_of_ranks()
    environment.pop("HOROVOD_FUSION_THRESHOLD", None)  # a default
    calls = sorted({*CALLS.values(), *(call for call, _ in CHOICES.values())})
    command = command_of(front_end, "tests.docs.arguments", MODULES[front_end], json.dumps(calls),
                         environment=environment)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def differences(said: list[Argument], takes: dict[str, Any], front_end: str) -> list[str]:
    """Where a table and a call differ."""
    here = [one for one in said if one.front_end in (None, front_end)]
    found = [f"the table lacks {name}" for name in takes.keys() - {one.name for one in here}]
    for one in here:
        if one.name not in takes:
            found.append(f"the call has no {one.name}")
        elif takes[one.name] is None:
            found += [] if one.default is REQUIRED else [f"{one.name} is required"]
        elif one.default is REQUIRED or not _same(one.default, ast.literal_eval(takes[one.name])):
            found.append(f"the default of {one.name} is {takes[one.name]}")
    return found


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and type(one) is type(other)


def test_every_table_is_known():
    assert {table.where for table in OF_ARGUMENTS} == CALLS.keys()
    assert {table.where for table in OF_CHOICES} == CHOICES.keys()


@pytest.mark.distributed
@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("table", OF_ARGUMENTS, ids=lambda table: table.place)
def test_arguments_and_defaults_are_those_of_the_call(table: Table, front_end: str) -> None:
    assert differences(read_arguments(table), taken(front_end)[CALLS[table.where]], front_end) == []


def test_a_difference_is_noticed():
    said = [Argument("lam", 2.0, None), Argument("decay", 0.95, None), Argument("scaler", None, "torch")]
    takes = {"lam": "2.0", "decay": "0.95", "scaler": "None"}
    assert differences(said, takes, "torch") == []
    assert differences(said, {**takes, "eps": "1"}, "torch") == ["the table lacks eps"]
    assert differences(said, takes, "tensorflow") == ["the table lacks scaler"]
    wrong = [replace(said[0], default=2), *said[1:]]
    assert differences(wrong, takes, "torch") == ["the default of lam is 2.0"]
    assert differences(said, {"lam": None, "scaler": "None"}, "torch") == [
        "lam is required", "the call has no decay"]


@pytest.mark.distributed
@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("table", OF_CHOICES, ids=lambda table: table.place)
def test_the_choice_marked_as_default_is_it(table: Table, front_end: str) -> None:
    call, argument = CHOICES[table.where]
    values, default = read_choices(table)
    assert f"`{argument}=`" == table.head[0]
    assert len(values) == len(set(values)) > 1
    given = ast.literal_eval(taken(front_end)[call][argument])
    assert default == ([] if given is None else [given])


def test_options_of_the_installer_are_all_in_its_table():
    table = next(table for table in TABLES if table.head[0] == "option")
    actions = build_parser()._actions  # argparse has no other way
    subcommands = next(action for action in actions if action.choices)
    install = subcommands.choices["install-horovod"]  # type: ignore[index]
    options = {option for action in install._actions for option in action.option_strings}
    named = {word for row in table.rows for word in row[0].replace("`", " ").replace(",", " ").split()
             if word.startswith("--")}
    assert named == {option for option in options if option.startswith("--")} - {"--help"}

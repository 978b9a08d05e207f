"""Which frameworks the Makefile sets up; nothing is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def extras(venv: Path, *arguments: str) -> set[str]:
    """The frameworks among the extras that would be installed."""
    environ = {name: value for name, value in os.environ.items()
               if not name.startswith("MAKE") and name not in ("FRAMEWORKS", "FRAMEWORK", "VENV")}
    done = subprocess.run(["make", "-n", f"VENV={venv}", *arguments], cwd=ROOT, env=environ,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"--editable '\.\[(.*)\]'", done.stdout)
    return set(found[-1].split(",")) & {"torch", "tensorflow"}


def test_the_demo_sets_up_what_it_runs(tmp_path: Path) -> None:
    assert extras(tmp_path, "demo") == {"torch"}
    assert extras(tmp_path, "demo", "FRAMEWORK=tensorflow") == {"tensorflow"}
    assert extras(tmp_path, "demo", "FRAMEWORKS=torch tensorflow") == {"torch", "tensorflow"}
    assert extras(tmp_path, "setup") == extras(tmp_path, "test") == {"torch", "tensorflow"}
    assert extras(tmp_path, "demo", "test") == {"torch", "tensorflow"}


def test_the_demo_leaves_an_environment_with_both_as_it_is(tmp_path: Path) -> None:
    (tmp_path / ".ready-tensorflow-torch-1-2").touch()  # of another version: set up anew, with both
    assert extras(tmp_path, "demo") == {"torch", "tensorflow"}

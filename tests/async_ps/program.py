"""Ranks of a program that runs once and ends, as a user's would: for tests in which ranks die."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ranks import ROOT, Outcome, kill_tree, launch_command, own_rank

RECOVERY = ["--enable-recovery"]


@dataclass
class Ended:
    """What became of a program: exit status, output, seconds, and each rank's outcome."""

    status: int | None
    output: str
    seconds: float
    outcomes: dict[int, Outcome] = field(default_factory=dict)


def run_program(folder: Path, name: str, size: int, *args: Any, timeout: float = 40.0,
                interrupt_after: str | None = None, send: int = signal.SIGINT,
                mpirun_args: list[str] | None = None, until: Sequence[int] = ()) -> Ended:
    """Runs ``tests.async_ps.faults.<name>(*args)`` on ``size`` ranks until the program ends.

    ``interrupt_after``: sends a signal to mpirun once this file exists. ``until``: it is killed
    once these ranks are through, for programs that do not end of themselves. A program that does
    not end in time is killed; its status is then None.
    """
    folder.mkdir(exist_ok=True)
    (folder / "args").write_bytes(pickle.dumps(args))
    command = [sys.executable, "-m", "tests.async_ps.program", name, str(folder)]
    flags = RECOVERY if mpirun_args is None else mpirun_args
    launch = launch_command(size, command, "mpirun", flags)
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(launch, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while interrupt_after is not None and time.monotonic() - began < timeout:
                if Path(interrupt_after).exists():
                    process.send_signal(send)
                    interrupt_after = None
                time.sleep(0.01)
            while until and process.poll() is None and time.monotonic() - began < timeout:
                if all((folder / f"outcome.{rank}").exists() for rank in until):
                    raise subprocess.TimeoutExpired(launch, timeout)
                time.sleep(0.01)
            status = process.wait(max(1.0, timeout - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            kill_tree(process.pid)
            process.wait()
    ended = Ended(status, (folder / "log").read_text(errors="replace"), time.monotonic() - began)
    for rank in range(size):
        path = folder / f"outcome.{rank}"
        ended.outcomes[rank] = (pickle.loads(path.read_bytes()) if path.exists()
                                else Outcome(rank, "died"))
    return ended


def _main(name: str, folder: Path) -> None:
    rank = own_rank()
    args = pickle.loads((folder / "args").read_bytes())
    function = getattr(importlib.import_module("tests.async_ps.faults"), name)
    failed = False
    try:
        outcome = Outcome(rank, "returned", function(*args))
    except BaseException as error:
        failed = True
        outcome = Outcome(rank, "raised", f"{type(error).__name__}: {error}",
                          traceback.format_exc())
    hidden = folder / f"part.{rank}"
    hidden.write_bytes(pickle.dumps(outcome))
    hidden.rename(folder / f"outcome.{rank}")
    if failed:
        raise SystemExit(3)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))

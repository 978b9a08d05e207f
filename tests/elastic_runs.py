"""A program under ``horovodrun`` whose hosts come and go: they are what a file says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.ranks import ROOT, kill_tree

TWO = "localhost:2\n"


def run_elastic(program, folder, *arguments, seconds=240, gloo=10):
    """Start it on the hosts of ``folder / "hosts"``, two ranks at first; its status and its output.

    ``gloo`` are the seconds that ranks wait for one that joins, and for one that is dead.
    """
    script = folder / "discover"
    (folder / "hosts").write_text(TWO)
    script.write_text(f"#!/bin/sh\ncat {folder}/hosts\n")
    script.chmod(0o755)
    command = [str(Path(sys.executable).parent / "horovodrun"), "--gloo", "-np", "2", "--min-np", "1",
               "--max-np", "3", "--host-discovery-script", str(script), "--network-interface", "lo",
               sys.executable, "-m", program, str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                   "HOROVOD_GLOO_TIMEOUT_SECONDS": str(gloo)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        status = None
    return status, (folder / "log").read_text(errors="replace")

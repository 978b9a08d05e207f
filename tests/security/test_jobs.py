"""Whole jobs while a stranger sends pickles, garbage and silence to every port of their processes."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hvd_ext.cli.environment import horovod_folder, unpatched_parts
from tests.conftest import LEFT_OUT
from tests.ranks import ROOT, environment_of_ranks, kill_tree
from tests.security.attacks import HOST, evil_base64, evil_pickle, released_message

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif("torch" in LEFT_OUT, reason="PyTorch is left out"),
    pytest.mark.skipif(bool(unpatched_parts(horovod_folder())), reason="Horovod was built with other edits"),
]
HOROVODRUN = str(Path(sys.executable).parent / "horovodrun")
FUNCTION = """
import sys, horovod
from tests.security.training import train
if __name__ == "__main__":
    for line in horovod.run(train, args=(sys.argv[1],), num_proc=2, use_gloo=sys.argv[2] == "gloo",
                            use_mpi=sys.argv[2] == "mpi"):
        print(line)
"""


def commands(folder: Path) -> dict[str, list[str]]:
    """Each kind of job, with its ranks on this machine."""
    (folder / "discover").write_text("#!/bin/sh\necho localhost:2\n")
    (folder / "discover").chmod(0o755)
    (folder / "function.py").write_text(FUNCTION)
    program = [sys.executable, "-m", "tests.security.training", str(folder)]
    elastic = ["-np", "2", "--min-np", "2", "--host-discovery-script", str(folder / "discover"),
               "--network-interface", "lo"]
    return {
        "gloo": [HOROVODRUN, "--gloo", "-np", "2", *program, "static"],
        "elastic": [HOROVODRUN, "--gloo", *elastic, *program, "elastic"],
        "function gloo": [sys.executable, str(folder / "function.py"), str(folder), "gloo"],
        "function mpi": [sys.executable, str(folder / "function.py"), str(folder), "mpi"],
    }


@contextlib.contextmanager
def job(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job, from when both its ranks train."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment_of_ranks(), stdin=subprocess.DEVNULL,
                                   stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while not all((folder / f"started.{rank}").exists() for rank in range(2)):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.05)
        yield process
    finally:
        kill_tree(process.pid)
        process.wait()


def ports_of(process: psutil.Process, ranks: bool) -> set[int]:
    """Ports that a launcher listens on and, if ``ranks``, its ranks; Open MPI's are not Horovod's."""
    found = set()
    for one in [process, *process.children(recursive=ranks)]:
        with contextlib.suppress(psutil.Error):
            if one.name() not in ("mpirun", "orted"):
                found |= {row.laddr.port for row in one.net_connections("tcp") if row.status == "LISTEN"}
    return found


def attack(port: int, mark: Path) -> Iterator[socket.socket]:
    """Send all that a stranger may think of; connections that stay open are the caller's."""
    bodies = (evil_pickle(mark), evil_base64(mark))
    requests = [f"{method} {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
                for body in bodies for method in ("PUT", "GET", "DELETE")
                for path in ("/worker_addresses/localhost:0", "/runfunc/func", "/runfunc_result/0",
                             "/runfunc_result/1", "/global/0", "/rank_and_size/localhost:0")]
    requests += [released_message(bytes(32), bodies[0]), bodies[0], b"\xff" * 1000]
    for data in requests:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1) as connection:
            connection.sendall(data)
    for number in range(20):
        with contextlib.suppress(OSError):
            connection = socket.create_connection((HOST, port), timeout=1)
            connection.sendall(b"\0" * number)
            yield connection


@pytest.mark.parametrize("kind", ["elastic", *(
    pytest.param(kind, marks=pytest.mark.extended) for kind in ("function gloo", "gloo", "function mpi"))])
def test_training_ends_right_under_attack(tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "mark"
    with job(commands(tmp_path)[kind], tmp_path) as process:
        ports = ports_of(psutil.Process(process.pid), ranks=kind != "function mpi")
        assert ports
        silent = [connection for port in sorted(ports) for connection in attack(port, mark)]
        (tmp_path / "attacked").touch()
        status = process.wait(240)
        log = (tmp_path / "log").read_text()
        assert status == 0, log
    for connection in silent:
        connection.close()
    assert not mark.exists()
    assert all(f"trained {rank} of 2" in log for rank in range(2)), log
    assert f"Horovod refused a request from {HOST}" in log


@pytest.mark.extended
def test_no_command_line_of_a_job_has_its_key(tmp_path: Path) -> None:
    with job(commands(tmp_path)["elastic"], tmp_path) as process:
        tree = psutil.Process(process.pid).children(recursive=True)
        keys = {one.environ().get("_HOROVOD_SECRET_KEY") for one in tree} - {None}
        assert len(keys) == 1
        lines = [" ".join(one.cmdline()) for one in tree]
        assert not any(keys.copy().pop() in line for line in lines)

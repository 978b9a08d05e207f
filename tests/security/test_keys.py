"""How the job's key travels: no command line that ``ps`` shows may contain it."""

from __future__ import annotations

import base64
import binascii
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security.attacks import DEADLINE_S

KEY = bytes(range(1, 33))
# It stands in for ssh: it writes its arguments down and gives those behind options and host to a shell.
SSH = """#!/bin/sh
printf '%s\\n' "$@" >> {folder}/arguments
while [ "$1" != far.invalid ]; do shift; done
shift
exec sh -c "$*" {redirection}
"""
PRELUDE = """
import sys
from horovod.runner.common.util.settings import Settings
from horovod.runner.common.util.timeout import Timeout
settings = Settings(key=bytes.fromhex(sys.argv[1]), num_proc=1, verbose=0, hosts="far.invalid:1",
                    start_timeout=Timeout(60, "{activity}"))
"""
WORKER = PRELUDE + """
from horovod.runner import gloo_run
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
host = sys.argv[2]
slot = get_host_assignments(parse_hosts(host + ":1"), 1)[0]
print(gloo_run._exec_command_fn(settings)(sys.argv[3], slot, [])[0])
"""
PROBE = PRELUDE + """
from horovod.runner.driver import driver_service
print(sorted(driver_service._driver_fn([sys.argv[2]], set(), settings, fn_cache=None)))
"""
# What a worker finds: the key in its environment, and whether any command line above it has it.
LOOK = ("env HOROVOD_RANK=0 {python} -c 'import os; key = os.environ.get(\"_HOROVOD_SECRET_KEY\", \"none\"); "
        "seen = \"\".join(open(\"/proc/%d/cmdline\" % pid).read() for pid in (os.getpid(), os.getppid())); "
        "print(\"key\", key, key in seen)'")


def call(source: Path, folder: Path, code: str, *arguments: str, redirection: str = "") -> str:
    """What code prints that runs with a Horovod, and the stand-in as ``ssh``."""
    (folder / "ssh").write_text(SSH.format(folder=folder, redirection=redirection))
    (folder / "ssh").chmod(0o755)
    environ = {**os.environ, "PYTHONPATH": str(source), "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", code, KEY.hex(), *arguments], env=environ,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout
    return done.stdout


def shows_key(arguments: str) -> bool:
    """Whether words of a command line contain the key, as it is or in a pickle."""
    if KEY.hex() in arguments:
        return True
    for word in arguments.replace("'", " ").split():
        try:
            if KEY in base64.b64decode(word, validate=True):
                return True
        except binascii.Error:
            continue
    return False


@pytest.mark.parametrize("host", ["localhost", "far.invalid"])
def test_a_worker_gets_the_key_unseen(sources: dict[str, Path], tmp_path: Path, host: str) -> None:
    printed = call(sources["edited"], tmp_path, WORKER, host, LOOK.format(python=sys.executable))
    assert f"key {KEY.hex()} False\n" in printed
    assert printed.endswith("\n0\n")
    remote = tmp_path / "arguments"
    assert remote.exists() is (host == "far.invalid")
    assert not (remote.exists() and shows_key(remote.read_text()))


@pytest.mark.parametrize("kind", ["released", "edited"])
def test_the_search_for_a_common_interface(sources: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Driver and task services over the stand-in: the released command line shows the key to all users."""
    printed = call(sources[kind], tmp_path, PROBE, "far.invalid")
    assert "'lo'" in printed
    assert shows_key((tmp_path / "arguments").read_text()) is (kind == "released")


def test_a_remote_shell_without_a_key_says_so(sources: dict[str, Path], tmp_path: Path) -> None:
    """Launchers that pass no standard input on, such as kubexec.sh, end with an error, not without a key."""
    printed = call(sources["edited"], tmp_path, WORKER, "far.invalid", "echo started",
                   redirection="< /dev/null")
    assert "no key of the job on standard input" in printed
    assert "started" not in printed


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun")
def test_mpirun_sends_no_value_on_a_command_line(tmp_path: Path) -> None:
    """``-x NAME`` takes the value from the environment, and hosts get it over mpirun's own connection."""
    agent = tmp_path / "agent"
    agent.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >> {tmp_path}/arguments\nexit 1\n")
    agent.chmod(0o755)
    command = ["mpirun", "--allow-run-as-root", "-np", "1", "-H", "far.invalid:1", "--mca", "plm_rsh_agent",
               str(agent), "-x", "_HOROVOD_SECRET_KEY", "true"]
    subprocess.run(command, env={**os.environ, "_HOROVOD_SECRET_KEY": KEY.hex()}, capture_output=True,
                   timeout=DEADLINE_S)
    assert "orted" in (tmp_path / "arguments").read_text()
    assert not shows_key((tmp_path / "arguments").read_text())

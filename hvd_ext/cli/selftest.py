"""A two-rank allreduce, started as a user would, with a time limit that nothing outlives."""

import os
import signal
import subprocess
import sys
import tempfile
from typing import IO

from hvd_ext.cli.diagnosis import TITLES
from hvd_ext.cli.environment import Facts
from hvd_ext.cli.finding import REBUILD, Finding

RANKS = 2
DONE = "hvd-ext-selftest"
_CODE = {
    "torch": (
        "import torch as framework, horovod.torch as hvd\n"
        "def ones(value): return framework.full((1000,), float(value))\n"
    ),
    "tensorflow": (
        "import tensorflow as framework, horovod.tensorflow as hvd\n"
        "def ones(value): return framework.fill((1000,), float(value))\n"
    ),
}
_RANK = """
import signal
signal.alarm({limit})  # a rank that hangs ends itself, whatever happens to its launcher
{front}
hvd.init()
mean = hvd.allreduce(ones(hvd.rank() + 1), op=hvd.Average, name="selftest").numpy()
assert hvd.size() == {ranks}, f"{{hvd.size()}} ranks instead of {ranks}"
assert abs(mean - {mean}).max() < 1e-6, f"mean {{mean[0]}} instead of {mean}"
print("{done}", hvd.rank(), flush=True)
hvd.shutdown()
"""


def rank_code(framework: str, limit: float) -> str:
    """The program of one rank."""
    mean = sum(range(1, RANKS + 1)) / RANKS
    return _RANK.format(
        limit=int(limit) + 5, front=_CODE[framework], ranks=RANKS, mean=mean, done=DONE
    )


def launch_command(facts: Facts, program: list[str]) -> list[str] | None:
    """The command that starts ``program`` on two ranks here; None where nothing can start it.

    ``mpirun`` where Horovod has MPI, else ``horovodrun --gloo``.
    """
    built = [framework.horovod for framework in facts.frameworks if framework.horovod]
    if facts.mpirun and any(with_.get("mpi") for with_ in built):
        command = [facts.mpirun, "-np", str(RANKS)]
        if "Open" in facts.mpirun_version:  # Open MPI, Open RTE
            # Its slots are physical cores, of which a small machine has one.
            command += ["--oversubscribe", "--bind-to", "none"]
            if hasattr(os, "geteuid") and os.geteuid() == 0:
                command.append("--allow-run-as-root")
        return command + program
    if facts.horovodrun and any(with_.get("gloo") for with_ in built):
        return [facts.horovodrun, "--gloo", "-np", str(RANKS), *program]
    return None


def allreduce(facts: Facts, framework: str, limit: float) -> Finding:
    """Reduce a vector over two ranks and say how that went.

    Args:
        limit: seconds after which the ranks are killed.
    """
    subject = f"Self-test {TITLES[framework]}"
    command = launch_command(facts, [sys.executable, "-c", rank_code(framework, limit)])
    if command is None:
        return Finding(subject, "no launcher that Horovod was built for", "problem", REBUILD)
    launcher = os.path.basename(command[0])
    status, printed = run_limited(command, limit)
    if status is None:
        value = f"{launcher}: no answer within {limit:g} s, killed"
        remedy = "see docs/install.md, \"When it fails\": a two-rank run hangs"
        return Finding(subject, value, "problem", remedy)
    ranks = printed.count(DONE)
    if status or ranks != RANKS:
        lines = [line for line in printed.splitlines() if line.strip() and DONE not in line]
        errors = [line for line in lines if "Error" in line] or lines
        value = f"{launcher}: exit status {status}, {ranks} of {RANKS} ranks: {' '.join(errors[-3:])}"
        return Finding(subject, value[:600], "problem", f"{REBUILD} --force")
    return Finding(subject, f"allreduce on {RANKS} ranks by {launcher}")


def run_limited(command: list[str], limit: float) -> tuple[int | None, str]:
    """Run a command; its exit status (None where it was killed at the limit) and what it printed.

    Output goes through a file: a stray grandchild that keeps a pipe open could not hold this up.
    """
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end_process(process)
        return status, _read_file(output)


def _end_process(process: "subprocess.Popen[bytes]") -> None:
    """Ask a launcher and its ranks to end, then make them."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _read_file(file: IO[str]) -> str:
    file.seek(0)
    return file.read()

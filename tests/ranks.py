"""Real ranks from one ordinary pytest session.

``Ranks`` starts N processes under ``mpirun`` (or ``horovodrun --gloo``), keeps them, and runs
module-level functions on all of them at once, as often as asked::

    def mean_of_ranks(scale):            # in a test module; every rank calls it
        return float(hvd.allreduce(torch.tensor(scale * hvd.rank())))

    def test_mean(ranks):                # the fixture of tests/conftest.py
        assert ranks(2).run(mean_of_ranks, 10.0) == [5.0, 5.0]

``run`` returns each rank's result, by rank. When a rank raises, the error shows that rank's
traceback and the rest are killed; when ranks do not answer within the time limit, it shows where
each of them stood. ``run_ranks`` does the same with ranks of its own that end with the call: for
tests that kill ranks, or need another launcher, environment or Horovod not yet initialised. With
``check=False`` it returns an ``Outcome`` a rank and does not raise.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fork_server import RANK_VARIABLES, Servers

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 90.0
Launcher = Callable[[int, Sequence[str]], list[str]]
command_of = Servers().command  # of a rank, forked from a process that has imported its framework
LEAVING: list[Ranks] = []  # told to end, and not waited for


class RankFailure(AssertionError):
    """A rank raised, died or did not answer."""


@dataclass
class Outcome:
    """What became of a task on one rank: ``state`` is "returned", "raised", "died" or "silent"."""

    rank: int
    state: str
    value: Any = None
    traceback: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} {self.state}\n{self.traceback}".rstrip()


class Ranks:
    """N processes that run functions together until ``close()``.

    Args:
        size: number of ranks.
        launcher: "mpirun" or "gloo" (``horovodrun --gloo``), or what makes the command line from the
            number of ranks and a rank's command.
        init: front end whose Horovod is initialised first: "torch", "tensorflow" or None.
        env: further environment variables.
        mpirun_args: further arguments of ``mpirun``.
    """

    def __init__(self, size: int, *, launcher: str | Launcher = "mpirun", init: str | None = "torch",
                 env: dict[str, str] | None = None, mpirun_args: Sequence[str] = ()) -> None:
        reap_ranks()
        self.size = size
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.tasks = 0
        self.told_to_leave = 0.0
        self.log = self.folder / "log"
        environment = environment_of_ranks(**(env or {}))
        worker = command_of(None if callable(launcher) else init, "tests.ranks", str(self.folder),
                            init or "none", str(os.getpid()), environment=environment)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                launcher(size, worker) if callable(launcher)
                else launch_command(size, worker, launcher, mpirun_args), cwd=ROOT, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60.0,
            check: bool = True) -> list[Any]:
        """Call ``function(*args)`` on every rank; the results by rank (``Outcome``s without check)."""
        self.tasks += 1
        first = self.tasks == 1
        name = function.__module__
        if name == "__main__":  # a benchmark started with -m: ranks import it under its own name
            name = sys.modules[name].__spec__.name
        task = (name, function.__qualname__, args, timeout)
        hidden = self.folder / "task.part"
        hidden.write_bytes(pickle.dumps(task))
        hidden.rename(self.folder / f"task{self.tasks}")
        outcomes = self._collect(time.monotonic() + timeout + (START_SECONDS if first else 0), check)
        if not check:
            return outcomes
        if any(outcome.state != "returned" for outcome in outcomes):
            said = "\n".join(str(outcome) for outcome in outcomes if outcome.state != "returned")
            time.sleep(0.5)  # the launcher passes on what they printed some time after they did
            tail = self.output()[-3000:]
            self.close(kill=True)
            raise RankFailure(f"{function.__qualname__} failed on {self.size} ranks\n{said}\n"
                              f"--- output of the ranks ---\n{tail}")
        return [outcome.value for outcome in outcomes]

    def _collect(self, deadline: float, check: bool) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        ended: float | None = None
        raised: float | None = None
        while len(outcomes) < self.size:
            for rank in range(self.size):
                path = self.folder / f"result{self.tasks}.{rank}"
                if rank not in outcomes and path.exists():
                    outcomes[rank] = pickle.loads(path.read_bytes())
                    if check and outcomes[rank].state == "raised":
                        raised = raised or time.monotonic()
            now = time.monotonic()
            if self.process.poll() is not None:
                ended = ended or now
                if now - ended > 0.5:
                    break
            # The others get a moment to fail too: the first to raise is not always the cause.
            if now > deadline or (raised is not None and now - raised > 3.0):
                break
            time.sleep(0.005)
        state = "died" if self.process.poll() is not None else "silent"
        for rank in range(self.size):
            if rank not in outcomes:
                outcomes[rank] = Outcome(rank, state, traceback=self._stack(rank))
        return [outcomes[rank] for rank in range(self.size)]

    def _stack(self, rank: int) -> str:
        path = self.folder / f"stack.{rank}"
        return path.read_text() if path.exists() else ""

    def output(self) -> str:
        """What the ranks and the launcher printed so far."""
        return self.log.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        """Whether the launcher still runs."""
        return self.process.poll() is None

    def close(self, *, kill: bool = False) -> int | None:
        """End the ranks, by force when asked or when they do not end; the launcher's exit status."""
        if not self.folder.exists():
            return self.process.poll()
        (self.folder / "stop").touch()
        if not kill:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        if self.alive:
            kill_tree(self.process.pid)
        status = self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        return status

    def leave(self) -> None:
        """Have the ranks end, without waiting for them: MPI takes a second."""
        if self.folder.exists():
            (self.folder / "stop").touch()
            self.told_to_leave = time.monotonic()
            LEAVING.append(self)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(kill=exc[0] is not None)


def run_ranks(function: Callable[..., Any], size: int = 2, *args: Any, timeout: float = 60.0,
              check: bool = True, **options: Any) -> list[Any]:
    """Run ``function(*args)`` once on ``size`` ranks of its own; ``options`` are those of ``Ranks``."""
    ranks = Ranks(size, **options)
    try:
        return ranks.run(function, *args, timeout=timeout, check=check)
    finally:
        ranks.leave() if check else ranks.close(kill=True)


def reap_ranks(seconds: float = 10.0) -> None:
    """Clear away ranks that have ended after ``leave()``; those that have not for ``seconds`` are killed."""
    for ranks in list(LEAVING):
        if not ranks.alive or time.monotonic() - ranks.told_to_leave > seconds:
            ranks.close(kill=True)
            LEAVING.remove(ranks)


@atexit.register
def _wait_for_leaving() -> None:
    for ranks in LEAVING:
        ranks.close()


def run_program(module: str, *arguments: str, framework: str, size: int = 2, launcher: str = "mpirun",
                seconds: float = 300.0, **environment: str) -> tuple[int, str]:
    """The launcher's exit status and output of ``python -m module arguments`` on ranks of its own."""
    variables = environment_of_ranks(**environment)
    command = command_of(framework, module, *arguments, environment=variables)
    process = subprocess.Popen(launch_command(size, command, launcher), cwd=ROOT, env=variables, text=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        raise RankFailure(f"{module} {arguments} did not end\n{process.communicate()[0][-4000:]}") from None
    return process.returncode, output


def environment_of_ranks(**more: str) -> dict[str, str]:
    """This process's environment with what ranks of the tests need, and ``more``."""
    # Idle ranks negotiate once a cycle; the default of 1 ms keeps the cores busy with nothing.
    return {"HOROVOD_CYCLE_TIME": "3", **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "TF_CPP_MIN_LOG_LEVEL": "3", **more}


def launch_command(size: int, command: Sequence[str], launcher: str = "mpirun",
                   mpirun_args: Sequence[str] = ()) -> list[str]:
    """The command line that starts ``command`` on ``size`` ranks of this machine."""
    tools = Path(sys.executable).parent
    if launcher == "gloo":
        return [str(tools / "horovodrun"), "--gloo", "-np", str(size), "-H", f"localhost:{size}",
                *command]
    mpirun = tools / "mpirun"
    start = [str(mpirun) if mpirun.exists() else "mpirun", "--oversubscribe", "--bind-to", "none"]
    if os.geteuid() == 0:
        start.append("--allow-run-as-root")
    return [*start, *mpirun_args, "-np", str(size), *command]


def kill_tree(pid: int) -> None:
    """Kill a process with all that descend from it, also those in sessions of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(pid).children(recursive=True)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def own_rank() -> int:
    """This process's rank, as the launcher says."""
    for variable in RANK_VARIABLES:
        if variable in os.environ:
            return int(os.environ[variable])
    raise RuntimeError("not started by mpirun or horovodrun")


def _serve(folder: Path, init: str, owner: int) -> None:
    rank = own_rank()
    threading.Thread(target=_end_with, args=(owner,), daemon=True).start()
    if init != "none":
        importlib.import_module(f"horovod.{init}").init()
    if init == "torch":
        importlib.import_module("torch").set_num_threads(1)
    number = 1
    while not (folder / "stop").exists():
        path = folder / f"task{number}"
        if not path.exists():
            time.sleep(0.005)
            continue
        outcome = _run_task(folder, rank, *pickle.loads(path.read_bytes()))
        hidden = folder / f"part.{rank}"
        hidden.write_bytes(pickle.dumps(outcome))
        hidden.rename(folder / f"result{number}.{rank}")
        number += 1
    _leave()


def _leave() -> None:
    """End as an interpreter does, but for freeing every object: a forked rank would copy all its memory."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end_with(owner: int) -> None:
    """End this rank, whatever it does, when the session that started it is gone."""
    while Path(f"/proc/{owner}").exists():
        time.sleep(1.0)
    os._exit(1)


def _run_task(folder: Path, rank: int, module: str, name: str, args: tuple[Any, ...],
              timeout: float) -> Outcome:
    with (folder / f"stack.{rank}").open("w") as stack:
        faulthandler.dump_traceback_later(max(1.0, timeout - 1.0), file=stack)
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            return Outcome(rank, "returned", function(*args))
        except BaseException as error:
            return Outcome(rank, "raised", repr(error), traceback.format_exc())
        finally:
            faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    # The module under its own name, so that what it pickles can be read elsewhere.
    importlib.import_module("tests.ranks")._serve(
        Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    )

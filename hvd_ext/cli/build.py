"""Compile Horovod: run pip on the edited source, show how far it is, keep the whole log."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from hvd_ext.cli.console import CliError, stderr_console
from hvd_ext.cli.gpu import GpuPlan, build_variables, is_requested
from hvd_ext.cli.horovod_source import patch_id
from hvd_ext.cli.toolchain import HOROVOD_NAMES, Mpi

# What Horovod's setup needs here: the build is not isolated from the installed frameworks.
BUILD_NEEDS = (
    "setuptools>=64,<81",
    "wheel",
    "cloudpickle",
    "psutil",
    "pyyaml",
    "packaging",
    "cffi",
)
_PERCENT = re.compile(r"^\s*\[\s*(\d+)%\]\s*(.*)")
_ERROR = re.compile(r"(error:|CMake Error|Error \d|undefined reference|No space left|Killed)", re.I)
TAIL_LINES = 40


def build_environ(
    base: Mapping[str, str],
    *,
    frameworks: Mapping[str, str],
    mpi: Mpi,
    cmake: str,
    jobs: int,
    gpu: GpuPlan | None = None,
    shop: Path | None = None,
) -> dict[str, str]:
    """The environment of the build: the user's, completed where the user left something open.

    Args:
        shop: the folder that is built in; needed with ``gpu``.
    """
    environ = dict(base)
    for name, label in HOROVOD_NAMES.items():
        wanted = "WITH" if name in frameworks else "WITHOUT"
        environ.setdefault(f"HOROVOD_{wanted}_{label}", "1")
    if "HOROVOD_WITH_MXNET" not in environ:
        environ.setdefault("HOROVOD_WITHOUT_MXNET", "1")
    if mpi.flavour == "none":
        environ["HOROVOD_WITHOUT_MPI"] = "1"
    else:
        environ["HOROVOD_WITH_MPI"] = "1"  # else a broken MPI is left out without a word
    if gpu is not None:
        assert shop is not None
        environ.update(build_variables(gpu, shop, environ))
    if mpi.folder is not None:
        environ["PATH"] = f"{mpi.folder}{os.pathsep}{environ.get('PATH', '')}"
    rpath = [mpi.rpath] if mpi.rpath else []
    rpath += gpu.rpath if gpu is not None else []
    if rpath:
        environ["HVD_EXT_RPATH"] = ";".join(rpath)
        # Libraries of the machine may lie anywhere: their folders are kept as they are.
        movable = mpi.flavour != "system" and (gpu.movable if gpu else not is_requested(environ))
        environ["HVD_EXT_RPATH_USE_LINK_PATH"] = "OFF" if movable else "ON"
    environ["HVD_EXT_EDITS"] = patch_id()
    environ["HOROVOD_CMAKE"] = cmake
    environ.setdefault("CMAKE_POLICY_VERSION_MINIMUM", "3.5")
    if environ.pop("MAKELEVEL", None) is not None:
        # Started from a Makefile: these are that make's own flags, not the user's wish.
        environ.pop("MAKEFLAGS", None)
        environ.pop("MFLAGS", None)
    environ["MAKEFLAGS"] = environ.get("MAKEFLAGS") or f"-j{jobs}"
    # A generator of the user's other projects would not understand make's options.
    environ.pop("CMAKE_GENERATOR", None)
    return environ


def compile_wheel(source: Path, into: Path, *, environ: Mapping[str, str], log: Path) -> Path:
    """Build the wheel of ``source`` in the folder ``into``.

    Raises:
        Failure: the build failed; the message ends with the log's telling lines.
    """
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps"]
    command += ["--no-build-isolation", "--no-cache-dir", "--wheel-dir", str(into), str(source)]
    started = time.monotonic()
    with log.open("w") as lines:
        lines.write(" ".join(command) + "\n")
        status = _run_build(command, environ, lines, BuildProgress(stderr_console()))
    wheels = sorted(into.glob("horovod-*.whl"))
    if status or not wheels:
        raise CliError(
            f"building Horovod failed after {time.monotonic() - started:.0f} s. From {log}:\n"
            + error_lines(log.read_text(errors="replace")),
            "see docs/install.md, \"When it fails\"; the whole log is " + str(log),
        )
    return wheels[0]


def error_lines(log: str, limit: int = TAIL_LINES) -> str:
    """The first lines of a build log that name an error, and its end."""
    lines = log.splitlines()
    errors = [line for line in lines[:-limit] if _ERROR.search(line)][:10]
    gap = ["..."] if errors else []
    return "\n".join(errors + gap + lines[-limit:])


class BuildProgress:
    """How far a build is, from CMake's output: a bar on a terminal, a line each 10 % elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.percent = 0
        self._said = -1
        self._started = time.monotonic()
        columns = (TextColumn("Horovod"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bar = Progress(
            *columns, TextColumn("{task.description}"), console=console, disable=not self._live
        )
        self._task = self._bar.add_task("configuring", total=100)

    @property
    def _live(self) -> bool:
        return self.console.is_terminal

    def __enter__(self) -> "BuildProgress":
        self._started = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def feed_line(self, line: str) -> None:
        """Take in one line of the build's output."""
        match = _PERCENT.match(line)
        if match is None:
            return
        self.percent = max(self.percent, int(match[1]))
        # "Building CXX object horovod/torch/CMakeFiles/pytorch.dir/mpi_ops_v2.cc.o"
        what = match[2].split("/")[-1].split(" ")[-1].removesuffix(".o")
        self._bar.update(self._task, completed=self.percent, description=what[:40])
        if not self._live and self.percent // 10 > self._said:
            self._said = self.percent // 10
            seconds = time.monotonic() - self._started
            self.console.print(f"Horovod: {self.percent:3d} % after {seconds:.0f} s")


def _run_build(command: list[str], environ: Mapping[str, str], log: TextIO, meter: BuildProgress) -> int:
    with meter, subprocess.Popen(
        command,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # one group, so that an interrupted build leaves no compiler behind
    ) as process, terminated_as_interrupt():
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                meter.feed_line(line)
            return process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that children are cleaned up."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

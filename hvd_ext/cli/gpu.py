"""Whether Horovod gets GPU operations, and with what: the decision, and the build's variables."""

import importlib.metadata
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvd_ext.cli import cuda
from hvd_ext.cli.console import CliError

# Any of these is the user's own choice of GPU operations.
OPERATIONS = (
    "HOROVOD_GPU_OPERATIONS",
    "HOROVOD_GPU_ALLREDUCE",
    "HOROVOD_GPU_ALLGATHER",
    "HOROVOD_GPU_BROADCAST",
    "HOROVOD_GPU_ALLTOALL",
    "HOROVOD_GPU_REDUCESCATTER",
)
_NCCL_WHEELS = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")


@dataclass(frozen=True)
class Nccl:
    """The NCCL wheel that a framework brought: its version and folder."""

    version: str
    home: Path


@dataclass(frozen=True)
class GpuPlan:
    """GPU operations.

    Args:
        release: the CUDA release of the frameworks.
        toolkit: what Horovod is compiled with.
        nccl: the frameworks' own NCCL; None where it is the machine's, or not asked for.
        reason: which toolkit this is, and why, in words.
    """

    release: str
    toolkit: cuda.Toolkit
    nccl: Nccl | None
    reason: str

    @property
    def identity(self) -> dict[str, str]:
        """What tells one GPU build from another in the cache's key."""
        nccl = self.nccl.version if self.nccl else "the machine's"
        return {"toolkit": f"{self.toolkit.release} ({self.toolkit.origin})", "nccl": nccl}

    @property
    def movable(self) -> bool:
        """Whether all that it links lies in the Python environment, at places known from the library's."""
        return self.nccl is not None and self.toolkit.origin == "wheels"

    @property
    def rpath(self) -> list[str]:
        """Folders relative to Horovod's libraries, which lie in horovod/torch and horovod/tensorflow."""
        if self.nccl is None:
            return []
        major = cuda.parse_version(self.release)[0]
        return ["$ORIGIN/../../nvidia/nccl/lib", f"$ORIGIN/../../nvidia/cu{major}/lib"]


def is_requested(environ: Mapping[str, str]) -> bool:
    """Whether the user's variables ask for GPU operations."""
    return any(environ.get(name) for name in OPERATIONS)


def decide_operations(flag: bool | None, frameworks: Mapping[str, str], cache: Path,
                      environ: Mapping[str, str] = os.environ, origin: str = "auto") -> tuple[GpuPlan | None,
                                                                                              str]:
    """The GPU operations to build, None for CPU operations; and in words why.

    Args:
        flag: True for ``--gpu``, False for ``--no-gpu``, None to go by what is there.
        frameworks: those that Horovod is built for.
        cache: where toolkits made of wheels are kept.
        origin: which toolkit, "auto", "machine" or "wheels".

    Raises:
        Failure: GPU operations are asked for and a framework cannot have them.
    """
    if flag is False:
        named = [name for name in OPERATIONS if environ.get(name)]
        if named:
            raise CliError(f"--no-gpu, but {named[0]}={environ[named[0]]}",
                           f"unset {named[0]}, or leave --no-gpu out")
        return None, "CPU operations: --no-gpu"
    wanted = bool(flag) or is_requested(environ)
    if environ.get("HOROVOD_GPU", "CUDA") != "CUDA":
        return None, f"GPU operations as the variables say: HOROVOD_GPU={environ['HOROVOD_GPU']}"
    if not wanted and not cuda.gpu_visible():
        return None, "CPU operations: no NVIDIA GPU is visible (--gpu builds for one all the same)"
    try:
        plan = _plan_operations(frameworks, cache, environ, origin)
    except CliError as failure:
        if wanted:
            raise
        return None, f"CPU operations: {failure}. {failure.remedy}"
    return plan, f"GPU operations for CUDA {plan.release}; toolkit {plan.toolkit.release}: {plan.reason}"


def _plan_operations(frameworks: Mapping[str, str], cache: Path, environ: Mapping[str, str],
                     origin: str) -> GpuPlan:
    """GPU operations for these frameworks.

    Raises:
        Failure: they cannot have them, or there is no toolkit or no NCCL.
    """
    releases = {name: cuda.built_with(name) for name in frameworks}
    _same_release(releases)
    release = next(value for value in releases.values() if value)
    compiler = shlex.split(environ.get("CXX", ""))[-1:] or ["c++"]
    toolkit, reason = cuda.choose_toolkit(release, cache, environ, compiler[0], origin)
    if any(environ.get(name) for name in ("HOROVOD_NCCL_HOME", "HOROVOD_NCCL_LIB", "HOROVOD_NCCL_INCLUDE")):
        return GpuPlan(release, toolkit, None, reason)
    nccl = nccl_wheel()
    if nccl is None and toolkit.origin == "wheels" and _uses_nccl(environ):
        raise CliError("no NCCL came with the frameworks", "set HOROVOD_NCCL_HOME to one")
    return GpuPlan(release, toolkit, nccl, reason)


def _same_release(releases: Mapping[str, str | None]) -> None:
    """Check that one Horovod with GPU operations can serve these frameworks.

    Raises:
        Failure: it cannot.
    """
    without = [name for name, release in releases.items() if release is None]
    if len(without) == len(releases):
        raise CliError(f"no GPU operations: {' and '.join(without)} is built for the CPU",
                       "install a CUDA build of the framework (pip's own torch is one)")
    if without:
        other = "TENSORFLOW" if without == ["tensorflow"] else "PYTORCH"
        raise CliError(f"{without[0]} is built for the CPU, and one Horovod with GPU operations serves "
                       "frameworks with CUDA only",
                       f"HOROVOD_WITHOUT_{other}=1 hvd-ext install-horovod --gpu, or install its CUDA build")
    if len({cuda.parse_version(release)[0] for release in releases.values() if release}) > 1:
        told = " and ".join(f"{name} with CUDA {release}" for name, release in releases.items())
        raise CliError(f"{told}: one Horovod cannot serve two major releases",
                       "use one environment for each, or HOROVOD_WITHOUT_TENSORFLOW=1")


def nccl_wheel() -> Nccl | None:
    """The NCCL that came with the frameworks, if any."""
    for name in _NCCL_WHEELS:
        try:
            wheel = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        home = Path(str(wheel.locate_file("nvidia/nccl"))).resolve()
        if (home / "include" / "nccl.h").exists():
            return Nccl(wheel.version, home)
    return None


def _uses_nccl(environ: Mapping[str, str]) -> bool:
    chosen = [environ[name] for name in OPERATIONS if environ.get(name)]
    return not chosen or "NCCL" in chosen


def build_variables(plan: GpuPlan, shop: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of the build alone.

    Args:
        shop: the folder that is built in; NCCL's links for the linker are made there.
    """
    home = plan.toolkit.home
    assert home is not None, "the toolkit has been put together"
    found = {
        "CUDACXX": str(home / "bin" / "nvcc"),
        "CUDAToolkit_ROOT": str(home),
        "CUDA_HOME": str(home),
        "HOROVOD_CUDA_HOME": str(home),
        "PATH": f"{home / 'bin'}{os.pathsep}{environ.get('PATH', '')}",
    }
    if not is_requested(environ):
        found["HOROVOD_GPU_OPERATIONS"] = "NCCL"
    if plan.nccl is not None:
        links = shop / "nccl"
        (links / "lib").mkdir(parents=True)
        (links / "include").symlink_to(plan.nccl.home / "include")
        for library in (plan.nccl.home / "lib").glob("libnccl.so*"):
            (links / "lib" / library.name).symlink_to(library)
        cuda.add_linker_names(links / "lib")
        found["HOROVOD_NCCL_HOME"] = str(links)
        found["HOROVOD_NCCL_LINK"] = "SHARED"
    return found

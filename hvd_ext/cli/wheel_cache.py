"""The user's cache of built Horovod wheels: one folder a combination of versions that matter."""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hvd_ext.cli.toolchain import Mpi

# Variables that change what comes out of the build. Those that only choose frameworks or MPI
# (HOROVOD_WITHOUT_TENSORFLOW, ...) are not here: their outcome is among the ingredients.
BUILD_VARIABLES = (
    "CCL_CONFIGURATION",
    "CCL_ROOT",
    "CUDA_HOME",
    "CXX",
    "CXXFLAGS",
    "HOROVOD_ALLOW_MIXED_GPU_IMPL",
    "HOROVOD_BUILD_ARCH_FLAGS",
    "HOROVOD_BUILD_CUDA_CC_LIST",
    "HOROVOD_CPU_OPERATIONS",
    "HOROVOD_CUDA_HOME",
    "HOROVOD_DEBUG",
    "HOROVOD_GPU",
    "HOROVOD_GPU_ALLGATHER",
    "HOROVOD_GPU_ALLREDUCE",
    "HOROVOD_GPU_ALLTOALL",
    "HOROVOD_GPU_BROADCAST",
    "HOROVOD_GPU_OPERATIONS",
    "HOROVOD_GPU_REDUCESCATTER",
    "HOROVOD_LOCAL_VERSION",
    "HOROVOD_NCCL_HOME",
    "HOROVOD_NCCL_INCLUDE",
    "HOROVOD_NCCL_LIB",
    "HOROVOD_NCCL_LINK",
    "HOROVOD_NVTX_INCLUDE",
    "HOROVOD_ROCM_HOME",
    "HOROVOD_SKIP_COMPILE",
    "HOROVOD_WITHOUT_GLOO",
    "HOROVOD_WITHOUT_MXNET",
    "HOROVOD_WITHOUT_NVTX",
    "HOROVOD_WITH_MXNET",
    "HOROVOD_WITH_NVTX",
    "LDFLAGS",
    "MPI_HOME",
)


def default_root(environ: Mapping[str, str] = os.environ) -> Path:
    """The user's cache folder of hvd-ext."""
    base = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base).expanduser() / "hvd-ext" / "horovod"


def key_inputs(
    *,
    horovod: str,
    patch: str,
    frameworks: Mapping[str, str],
    mpi: Mpi,
    compiler: str,
    cpu_flags: list[str],
    gpu: Mapping[str, str] | None,
    environ: Mapping[str, str],
) -> dict[str, object]:
    """Everything that two builds must share to be the same wheel, readable as JSON."""
    return {
        "horovod": horovod,
        "patch": patch,
        "frameworks": dict(sorted(frameworks.items())),
        "python": f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}",
        "platform": sysconfig.get_platform(),
        "libc": "-".join(platform.libc_ver()),
        "compiler": compiler,
        "cpu_flags": cpu_flags,
        "gpu": dict(gpu) if gpu else None,
        "mpi": {"flavour": mpi.flavour, "version": mpi.version},
        "variables": {name: environ[name] for name in BUILD_VARIABLES if environ.get(name)},
    }


def folder_name(parts: Mapping[str, object]) -> str:
    """The name of the cache's folder for these ingredients."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class CacheEntry:
    """One folder of the cache: the build's ingredients and log, and the wheel once it is whole."""

    def __init__(self, root: Path, parts: Mapping[str, object]) -> None:
        self.parts = parts
        self.key = folder_name(parts)
        self.folder = root / self.key
        self.log = self.folder / "build.log"

    def finished_wheel(self) -> Path | None:
        """The finished wheel, if there is one."""
        return next(iter(sorted(self.folder.glob("*.whl"))), None)

    def store_wheel(self, wheel: Path) -> Path:
        """Take over a built wheel; it appears in the cache whole or not at all."""
        (self.folder / "build.json").write_text(json.dumps(self.parts, indent=1) + "\n")
        part = self.folder / f"{wheel.name}.part"
        shutil.copyfile(wheel, part)
        for old in self.folder.glob("*.whl"):
            if old.name != wheel.name:
                old.unlink()
        target = self.folder / wheel.name
        os.replace(part, target)
        return target

    @contextmanager
    def hold_lock(self) -> Iterator[None]:
        """Hold this folder alone: a second builder waits and then finds the first one's wheel."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def is_locked(self) -> bool:
        """Whether somebody else holds the lock at this moment."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    @contextmanager
    def build_dir(self) -> Iterator[Path]:
        """A folder on the cache's disk to build in, removed at the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=self.folder) as name:
            yield Path(name)

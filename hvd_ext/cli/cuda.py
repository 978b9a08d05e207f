"""CUDA on this machine, found without a framework: driver, toolkits, and a toolkit made of wheels."""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvd_ext.cli.console import CliError
from hvd_ext.cli.toolchain import output_of

# What a toolkit consists of, as wheels. Before CUDA 13 they bring no nvcc.
_WHEELS = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
_FIRST_WITH_NVCC = 13
# Where a framework's package says which CUDA it was built with, and in which words.
_BUILT_WITH = {
    "torch": ("version.py", re.compile(r"^cuda\b[^=\n]*= *['\"]([\d.]+)", re.M)),
    "tensorflow": ("python/platform/build_info.py", re.compile(r"['\"]cuda_version['\"][,:] *['\"]([\d.]+)")),
}
_PROGRAM = """#include <cuda_runtime.h>
__global__ void twice(float* x) { x[threadIdx.x] *= 2; }
extern "C" int run(float* x) { twice<<<1, 32>>>(x); return cudaGetLastError(); }
"""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit.

    Args:
        release: such as "13.0".
        origin: "machine" or "wheels".
        home: its folder, with ``bin/nvcc``; None for one of wheels that is still to be put together.
    """

    release: str
    origin: str
    home: Path | None


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver: its version, and the newest CUDA release that it runs."""

    version: str
    cuda: str


def parse_version(release: str) -> tuple[int, ...]:
    """"13.0" as (13, 0), to compare with."""
    return tuple(int(part) for part in re.findall(r"\d+", release)[:2])


def gpu_visible() -> bool:
    """Whether the driver shows an NVIDIA GPU."""
    return shutil.which("nvidia-smi") is not None and "GPU" in output_of(["nvidia-smi", "-L"])


def find_driver() -> Driver | None:
    """The driver that ``nvidia-smi`` tells of; None where there is none."""
    text = output_of(["nvidia-smi"]) if shutil.which("nvidia-smi") else ""
    version = re.search(r"Driver Version: *([\d.]+)", text)
    release = re.search(r"CUDA Version: *([\d.]+)", text)
    return Driver(version[1], release[1]) if version and release else None


def built_with(framework: str) -> str | None:
    """The CUDA release that an installed framework was built with, from its files; None for a CPU build."""
    spec = importlib.util.find_spec(framework)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        name, pattern = _BUILT_WITH[framework]
        try:
            match = pattern.search((Path(folder) / name).read_text())
        except OSError:
            continue
        if match:
            return ".".join(match[1].split(".")[:2])
    return None


def machine_toolkit(environ: Mapping[str, str] = os.environ) -> Toolkit | None:
    """The first complete toolkit: ``HOROVOD_CUDA_HOME``, ``CUDA_HOME``, nvcc on the PATH, /usr/local/cuda."""
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    found = [Path(environ[name]) for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME") if environ.get(name)]
    found += [Path(nvcc).resolve().parent.parent] if nvcc else []
    for home in (*found, Path("/usr/local/cuda")):
        if (home / "bin" / "nvcc").exists() and _has_headers(home):
            release = release_of(home)
            if release:
                return Toolkit(release, "machine", home)
    return None


def _has_headers(home: Path) -> bool:
    """Whether the headers are there, in NVIDIA's place or in conda's."""
    return any((folder / "cuda_runtime.h").exists()
               for folder in (home / "include", *home.glob("targets/*/include")))


def release_of(home: Path) -> str:
    """What the nvcc of a toolkit says it is, such as "13.0"; empty where it does not run."""
    match = re.search(r"release ([\d.]+)", output_of([str(home / "bin" / "nvcc"), "--version"]))
    return match[1] if match else ""


def incompatibility(toolkit: Toolkit, wanted: str, compiler: str = "c++") -> str:
    """Why a toolkit does not serve a framework that was built with CUDA ``wanted``; empty where it does.

    CUDA keeps its binary interface within a major release. Whether a toolkit and the C++ compiler get
    along is known to nvcc: it compiles and links a kernel here.
    """
    if parse_version(toolkit.release)[0] != parse_version(wanted)[0]:
        return f"CUDA {toolkit.release} is another major release than {wanted}"
    if toolkit.home is None:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "try.cu"
        program.write_text(_PROGRAM)
        command = [str(toolkit.home / "bin" / "nvcc"), "-std=c++17", "-shared", "-Xcompiler", "-fPIC"]
        command += ["-ccbin", compiler, str(program), "-o", str(Path(folder) / "try.so")]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
    return " ".join(lines[:3]) or f"nvcc ended with status {done.returncode}" if done.returncode else ""


def choose_toolkit(wanted: str, cache: Path, environ: Mapping[str, str] = os.environ,
                   compiler: str = "c++", origin: str = "auto") -> tuple[Toolkit, str]:
    """The toolkit for a framework built with CUDA ``wanted``, and in words why this one.

    Args:
        origin: "machine", "wheels", or "auto" for the machine's where it serves.
        cache: the folder in which toolkits made of wheels are kept.

    Raises:
        Failure: the one that is asked for does not serve, or there are no wheels.
    """
    machine = None if origin == "wheels" else machine_toolkit(environ)
    reason = "they are asked for" if origin == "wheels" else "the machine has none"
    if machine is not None:
        reason = incompatibility(machine, wanted, compiler)
        if not reason:
            return machine, f"the machine's, at {machine.home}"
        if environ.get("HOROVOD_CUDA_HOME"):
            raise CliError(
                f"HOROVOD_CUDA_HOME={environ['HOROVOD_CUDA_HOME']} does not serve: {reason}",
                f"set it to a toolkit of CUDA {wanted}, or unset it to have one from wheels",
            )
        reason = f"the machine's at {machine.home} does not serve: {reason}"
    if origin == "machine":
        raise CliError(f"--toolkit machine, but {reason}",
                       f"load a CUDA {wanted} toolkit (nvcc on the PATH, or HOROVOD_CUDA_HOME), or leave "
                       "--toolkit out")
    toolkit_wheels(wanted)
    home = cache / wanted
    present = home if (home / "bin" / "nvcc").exists() else None
    return Toolkit(wanted, "wheels", present), f"wheels pinned to {wanted}.*, since {reason}"


def toolkit_wheels(release: str) -> list[str]:
    """The requirements that make up a toolkit; without the pin, parts of different releases come.

    Raises:
        Failure: there are none with a compiler for this release.
    """
    if parse_version(release)[0] < _FIRST_WITH_NVCC:
        raise CliError(
            f"no toolkit of CUDA {release} that serves, and its wheels have no nvcc (those of CUDA "
            f"{_FIRST_WITH_NVCC} have)",
            f"load or install a CUDA {release} toolkit and set HOROVOD_CUDA_HOME to it, or install a "
            f"framework that is built with CUDA {_FIRST_WITH_NVCC}",
        )
    return [f"{name}=={'.'.join(str(part) for part in parse_version(release))}.*" for name in _WHEELS]


def build_toolkit(release: str, cache: Path, pip: Callable[[list[str]], None]) -> Toolkit:
    """Make a toolkit of wheels in ``cache``/``release``, which appears whole or not at all.

    Args:
        pip: installs what it is given, as ``pip install`` does.

    Raises:
        Failure: pip cannot get them, or they hold no nvcc.
    """
    home = cache / release
    if (home / "bin" / "nvcc").exists():
        return Toolkit(release, "wheels", home)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="toolkit-", dir=cache) as folder:
        pip(["--no-deps", "--target", folder, *toolkit_wheels(release)])
        trees = [tree for tree in Path(folder).glob("nvidia/*") if (tree / "bin" / "nvcc").exists()]
        if len(trees) != 1:
            raise CliError(f"the wheels {', '.join(toolkit_wheels(release))} hold no bin/nvcc",
                           "load or install a toolkit and set HOROVOD_CUDA_HOME to it")
        add_linker_names(trees[0] / "lib")
        (trees[0] / "lib64").symlink_to("lib")
        shutil.rmtree(home, ignore_errors=True)
        os.replace(trees[0], home)
    return Toolkit(release, "wheels", home)


def add_linker_names(folder: Path) -> None:
    """Beside each ``libx.so.13`` of ``folder`` the ``libx.so`` that a linker asks for."""
    for library in sorted(folder.glob("lib*.so.*")):
        plain = folder / f"{library.name.split('.so.')[0]}.so"
        if not plain.exists():
            plain.symlink_to(library.name)

"""What is installed on this machine, found without importing a framework into this process."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvd_ext import kernels
from hvd_ext.cli import cuda, toolchain
from hvd_ext.cli.horovod_patches import EDITS
from hvd_ext.cli.horovod_source import patch_id, sha256_of
from hvd_ext.cli.slurm import Slurm, look_for_slurm

# Run in processes of their own: a library built for another framework may crash on import.
_FRAMEWORK_PROBES = {
    "torch": (
        "import json, torch, torch.distributed\n"
        "nccl = torch.version.cuda and torch.distributed.is_nccl_available() and torch.cuda.nccl.version()\n"
        "print(json.dumps({'version': torch.__version__, 'cuda': torch.version.cuda,"
        " 'gpus': torch.cuda.device_count(),"
        " 'nccl': '.'.join(map(str, nccl)) if nccl else ''}), flush=True)\n"
    ),
    "tensorflow": (
        "import json, tensorflow as tf\n"
        "print(json.dumps({'version': tf.__version__,"
        " 'cuda': tf.sysconfig.get_build_info().get('cuda_version'),"
        " 'gpus': len(tf.config.list_physical_devices('GPU'))}),"
        " flush=True)\n"
    ),
}
_HOROVOD_PROBE = (
    "import json, horovod.{name} as hvd\n"
    "print(json.dumps({{what: int(getattr(hvd, what + '_built')())"
    " for what in ('mpi', 'gloo', 'nccl', 'cuda', 'rocm', 'ccl')}}), flush=True)\n"
)
_MPI4PY_PROBE = (
    "import json, mpi4py\n"
    "mpi4py.rc.initialize = False\n"
    "from mpi4py import MPI\n"
    "loaded = [line.split()[-1] for line in open('/proc/self/maps') if '/libmpi.so' in line]\n"
    "print(json.dumps({'libmpi': loaded[0] if loaded else ''}), flush=True)\n"
)


@dataclass(frozen=True)
class Framework:
    """One framework and Horovod's library for it.

    Args:
        name: import name, "torch" or "tensorflow".
        version: None where it is not installed.
        cuda: the CUDA release it was built with, if any.
        gpus: how many GPUs it sees.
        nccl: the NCCL that it loads, such as "2.29.7"; empty where it has none or does not say.
        error: why it does not import; empty where it does.
        horovod: what Horovod's library for it was built with, such as {"mpi": 1, "nccl": 22907}, where
            NCCL's number is its version; None where that library does not import.
        horovod_error: why not.
    """

    name: str
    version: str | None = None
    cuda: str | None = None
    gpus: int = 0
    nccl: str = ""
    error: str = ""
    horovod: dict[str, int] | None = None
    horovod_error: str = ""


@dataclass(frozen=True)
class Facts:
    """Everything the doctor judges, and nothing judged yet.

    Args:
        python: this Python's version.
        cores: how many cores this process may use.
        frameworks: torch and TensorFlow, installed or not.
        keras: version, or None.
        horovod: version of the installed Horovod, or None.
        unpatched: what of the installed Horovod this version of hvd-ext would edit otherwise.
        built_for: framework versions that Horovod was compiled for, from its ``metadata.json``.
        mpirun: path of the launcher that a shell would find, or None.
        mpirun_version: first line that it prints as its version.
        libmpi: the MPI library that Horovod's library loads; empty where unknown or none.
        horovodrun: path, or None.
        distutils: whether horovodrun finds it where it wants it, as Horovod's release does and an edited one
            does not; Python 3.12 has none of its own.
        mpi4py: version, or None.
        mpi4py_libmpi: the MPI library that it loads; empty where unknown or none.
        slurm: SLURM's launcher, or None.
        numba: version, or None.
        numba_error: why it does not import; empty where it does.
        kernels: what ``HVD_EXT_KERNELS`` says.
        gpu: whether the machine has an NVIDIA GPU, whatever the frameworks see.
        driver: the NVIDIA driver, or None.
        toolkit: the machine's CUDA toolkit, or None.
        horovod_cuda: the release of the toolkit that Horovod was compiled with; empty without GPU operations.
    """

    python: str
    cores: int
    frameworks: tuple[Framework, ...]
    keras: str | None = None
    horovod: str | None = None
    unpatched: tuple[str, ...] = ()
    built_for: Mapping[str, str] = field(default_factory=dict)
    mpirun: str | None = None
    mpirun_version: str = ""
    libmpi: str = ""
    horovodrun: str | None = None
    distutils: bool = True
    mpi4py: str | None = None
    mpi4py_libmpi: str = ""
    slurm: Slurm | None = None
    numba: str | None = None
    numba_error: str = ""
    kernels: str = kernels.CHOICES[0]
    gpu: bool = False
    driver: cuda.Driver | None = None
    toolkit: cuda.Toolkit | None = None
    horovod_cuda: str = ""


def collect_facts(limit: float = 180.0) -> Facts:
    """Look at this environment and machine.

    Args:
        limit: seconds for each import in its own process.
    """
    from hvd_ext.kernels import compiler  # which imports Numba

    horovod = toolchain.distribution_version("horovod")
    folder = horovod_folder()
    names = tuple(_FRAMEWORK_PROBES)
    with ThreadPoolExecutor(len(names)) as pool:
        frameworks = tuple(pool.map(lambda name: _inspect_framework(name, horovod, limit), names))
    mpirun = find_program("mpirun")
    version = toolchain.first_line([mpirun, "--version"]) if mpirun else ""
    mpi4py = toolchain.distribution_version("mpi4py")
    return Facts(
        python=platform.python_version(),
        cores=toolchain.count_cores(),
        frameworks=frameworks,
        keras=toolchain.distribution_version("keras"),
        horovod=horovod,
        unpatched=tuple(unpatched_parts(folder)),
        built_for=read_metadata(folder),
        mpirun=mpirun,
        mpirun_version=version,
        libmpi=loaded_libmpi(folder),
        horovodrun=find_program("horovodrun"),
        distutils=importlib.util.find_spec("distutils") is not None or not _wants_distutils(folder),
        mpi4py=mpi4py,
        mpi4py_libmpi=_mpi4py_libmpi(limit) if mpi4py else "",
        slurm=look_for_slurm(shutil.which("srun"), mpirun, open_mpi_major(version)),
        numba=toolchain.distribution_version("numba"),
        numba_error=compiler.PROBLEM or "",
        kernels=os.environ.get(kernels.VARIABLE) or kernels.CHOICES[0],
        gpu=cuda.gpu_visible(),
        driver=cuda.find_driver(),
        toolkit=cuda.machine_toolkit(),
        horovod_cuda=written_metadata(folder).get("hvd_ext_cuda", ""),
    )


def find_program(name: str) -> str | None:
    """A launcher: this environment's own first, as in an activated environment, then the PATH's."""
    own = os.pathsep.join(str(folder) for folder in sorted(toolchain.own_folders()))
    return shutil.which(name, path=own) or shutil.which(name)


def open_mpi_major(version: str) -> int:
    """4 from "mpirun (Open MPI) 4.1.8"; 0 for another MPI."""
    words = version.replace(")", " ").split()
    major = words[-1].split(".")[0] if "Open" in version and words else ""
    return int(major) if major.isdigit() else 0


def horovod_folder() -> Path | None:
    """The installed Horovod package, without importing it."""
    try:
        distribution = importlib.metadata.distribution("horovod")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file("horovod")))


def unpatched_parts(folder: Path | None) -> list[str]:
    """What in an installed Horovod is not as this version of hvd-ext leaves it: files, the library."""
    if folder is None:
        return []
    files = {edit.path: edit.after for edit in EDITS if edit.path.endswith(".py")}
    found = [path for path, after in files.items()
             if not (folder.parent / path).exists()
             or sha256_of((folder.parent / path).read_bytes()) != after]
    if written_metadata(folder).get("hvd_ext_edits") != patch_id():
        found.append("the compiled library")
    return found


def read_metadata(folder: Path | None) -> dict[str, str]:
    """The frameworks and versions that an installed Horovod was compiled for.

    Empty where there is no Horovod or no readable ``metadata.json`` in it.
    """
    labels = {label.lower(): name for name, label in toolchain.HOROVOD_NAMES.items()}
    written = written_metadata(folder)
    return {labels[label]: version for label, version in written.items() if label in labels}


def written_metadata(folder: Path | None) -> dict[str, str]:
    """What Horovod's build wrote down; empty where it cannot be read."""
    try:
        written = json.loads((folder / "metadata.json").read_text()) if folder else {}
    except (OSError, ValueError):
        return {}
    return {label: str(value) for label, value in written.items()}


def _wants_distutils(folder: Path | None) -> bool:
    try:
        return folder is not None and "distutils" in (folder / "runner" / "js_run.py").read_text()
    except OSError:
        return False


def loaded_libmpi(folder: Path | None) -> str:
    """Which ``libmpi`` the loader gives to Horovod's libraries; "not found" where it finds none."""
    for library in sorted(folder.glob("*/mpi_lib*.so")) if folder else []:
        for line in toolchain.output_of(["ldd", str(library)]).splitlines():
            name, _, target = line.strip().partition(" => ")
            if name.startswith("libmpi"):
                path = target.rsplit(" (", 1)[0]
                return path if path == "not found" else str(Path(path).resolve())
    return ""


def _mpi4py_libmpi(limit: float) -> str:
    """Which ``libmpi`` mpi4py loads, seen in a process of its own that starts no MPI."""
    results, _ = _run_probe(_MPI4PY_PROBE, limit)
    return str(results[0]["libmpi"]) if results else ""


def _inspect_framework(name: str, horovod: str | None, limit: float) -> Framework:
    """Import one framework, then Horovod's library for it, in a process of their own."""
    version = toolchain.installed_version(name)
    if version is None:
        return Framework(name)
    code = _FRAMEWORK_PROBES[name]
    if horovod is not None:
        code += _HOROVOD_PROBE.format(name=name)
    results, error = _run_probe(code, limit)
    if not results:
        return Framework(name, version, error=error)
    return Framework(
        name,
        version=results[0]["version"],
        cuda=results[0]["cuda"],
        gpus=results[0]["gpus"],
        nccl=results[0].get("nccl", ""),
        horovod=results[1] if len(results) > 1 else None,
        horovod_error=error,
    )


def _run_probe(code: str, limit: float) -> tuple[list[dict[str, Any]], str]:
    """The JSON lines that a probe printed before it ended, and why it ended early, if it did."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            status = subprocess.run(
                [sys.executable, "-c", code],
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit,
                stdin=subprocess.DEVNULL,
                env=environ,
            ).returncode
            error = f"the import crashed (signal {-status})" if status < 0 else ""
        except subprocess.TimeoutExpired:
            status, error = 1, f"the import took longer than {limit:g} s"
        output.seek(0)
        lines = output.read().strip().splitlines()
    results = [json.loads(line) for line in lines if line.startswith('{"')]
    if status and not error:
        error = lines[-1] if lines else f"exit status {status}"
    return results, error

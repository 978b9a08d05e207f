"""NCCL operations from wheels alone, in a fresh environment: built, linked and imported without a GPU.

Takes about 20 minutes and 10 GB; run by ``make test-gpu-build``. With ``HVD_EXT_GPU_BUILD=DIR`` the
environment and the cache are made in DIR and kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_ext.versions import TORCH

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu_build, pytest.mark.timeout(3600)]
PROBE = """
import json, torch, horovod.torch as hvd
print(json.dumps({"cuda": torch.version.cuda, "nccl": hvd.nccl_built(), "mpi": hvd.mpi_built(),
                  "gloo": hvd.gloo_built(), "horovod_cuda": hvd.cuda_built()}))
"""


def without_toolkit(environ: dict[str, str]) -> dict[str, str]:
    """The variables of a machine that has no CUDA toolkit on its PATH, with pip's own choice of torch."""
    kept = [folder for folder in environ["PATH"].split(os.pathsep) if not (Path(folder) / "nvcc").exists()]
    dropped = ("PIP_FIND_LINKS", "CUDA_HOME", "HOROVOD_CUDA_HOME", "HVD_EXT_FRAMEWORKS", "PYTHONPATH")
    environ = {name: value for name, value in environ.items() if name not in dropped}
    return {**environ, "PATH": os.pathsep.join(kept), "PIP_CONFIG_FILE": os.devnull,
            "HOROVOD_WITHOUT_TENSORFLOW": "1"}


def call(command: list[str], environ: dict[str, str], folder: Path) -> str:
    done = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_nccl_from_wheels_in_a_fresh_environment(tmp_path: Path) -> None:
    home = Path(os.environ.get("HVD_EXT_GPU_BUILD") or tmp_path).resolve()
    home.mkdir(parents=True, exist_ok=True)
    environ = without_toolkit(dict(os.environ))
    python = str(home / "venv" / "bin" / "python")
    if not Path(python).exists():
        call([sys.executable, "-m", "venv", str(home / "venv")], environ, home)
    call([python, "-m", "pip", "install", f"torch=={TORCH}"], environ, home)
    call([python, "-m", "pip", "install", "setuptools>=64,<81", "wheel"], environ, home)
    call([python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", str(ROOT)], environ, home)
    call([python, "-m", "pip", "install", "numpy", "rich"], environ, home)

    command = str(home / "venv" / "bin" / "hvd-ext")
    options = ["--gpu", "--toolkit", "wheels", "--cache-dir", str(home / "cache" / "horovod")]
    plan = call([command, "install-horovod", "--dry-run", *options], environ, home)
    assert "GPU operations for CUDA 13" in plan
    print(call([command, "install-horovod", *options], environ, home))

    found = json.loads(call([python, "-c", PROBE], environ, home))
    assert found["nccl"] > 20000
    assert found["mpi"]
    assert found["gloo"]
    assert found["horovod_cuda"]

    # The wheel goes anywhere: every folder in its run path is relative to the library.
    library = next((home / "venv").glob("lib/python*/site-packages/horovod/torch/mpi_lib_v2*.so"))
    assert shutil.which("readelf"), "readelf (binutils) comes with every compiler"
    paths = re.findall(r"R(?:UN)?PATH.*\[(.*)\]", call(["readelf", "-d", str(library)], environ, home))
    folders = [folder for path in paths for folder in path.split(":")]
    assert any(folder.endswith("nvidia/nccl/lib") for folder in folders)
    assert [folder for folder in folders if not folder.startswith("$ORIGIN/")] == []
    loaded = call(["ldd", str(library)], environ, home)
    assert re.search(r"libnccl\.so\.2 => \S*nvidia/nccl/lib", loaded), loaded
    assert re.search(r"libcudart\.so\.\d+ => \S*nvidia/cu13/lib", loaded), loaded

    report = subprocess.run([command, "doctor", "--json", "--no-selftest"], env=environ, cwd=home,
                            capture_output=True, text=True)
    findings = {finding["subject"]: finding for finding in json.loads(report.stdout)["findings"]}
    assert findings["GPU operations"]["value"].startswith("NCCL, compiled for 2.")
    assert findings["GPU operations"]["level"] == "ok", findings
    assert f"Horovod {found['cuda']}" in findings["CUDA"]["value"]

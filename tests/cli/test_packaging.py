"""The wheel and the source archive: complete, typed, and usable from elsewhere without the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from hvd_ext.versions import HVD_EXT
from tests.conftest import LEFT_OUT

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip")
FOLDERS = {"hvd_ext": "hvd_ext", "hvd_ext/torch": "torch_ext", "hvd_ext/tensorflow": "tf"}
# Every module given, imported one by one; MPI is not started by an import alone.
IMPORT_ALL = """
import importlib, json, mpi4py, sys
mpi4py.rc.initialize = False
import hvd_ext
print(json.dumps({"version": hvd_ext.__version__, "places": {
    name: importlib.import_module(name).__file__ for name in sys.argv[1:]}}))
"""
TYPED = """import hvd_ext.torch as hvd
from hvd_ext.reducers.buckets import plan_buckets
reveal_type(hvd.DelayCompensated(lam=2.0))
reveal_type(hvd.DelayCompensated(lam=2.0).lam)
reveal_type(plan_buckets)
"""


def call(*command: object, folder: Path, environ: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environ, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive of this checkout, made in a copy."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    call(sys.executable, "setup.py", "-q", "sdist", folder=copy)
    return next((copy / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive."""
    folder = tmp_path_factory.mktemp("wheel")
    call(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, archive,
         folder=folder)
    return next(folder.glob("hvd_ext-*.whl"))


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, which sees the packages of the running one but no editable install."""
    home = tmp_path_factory.mktemp("elsewhere")
    call(sys.executable, "-m", "venv", "--without-pip", home / "venv", folder=home)
    python = home / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(call(python, "-c", ask, folder=home).strip())
    mine = {sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))}
    (site / "running.pth").write_text("\n".join(sorted(mine)) + "\n")
    call(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel, folder=home)
    return home


def test_wheel_has_every_module_under_its_import_name(wheel: Path) -> None:
    expected = {f"{name}/{path.relative_to(ROOT / folder)}" for name, folder in FOLDERS.items()
                for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".diff", ".in")}
    expected |= {f"{name}/py.typed" for name in FOLDERS}
    with zipfile.ZipFile(wheel) as packed:
        found = {name for name in packed.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in packed.namelist() if name.endswith("/METADATA"))
        text = packed.read(metadata).decode()
    assert found == expected
    assert re.search(r"^License-Expression: Apache-2\.0$", text, re.M)
    assert re.search(rf"^Version: {re.escape(HVD_EXT)}$", text, re.M)


def test_source_archive_has_what_a_build_needs(archive: Path) -> None:
    with tarfile.open(archive) as packed:
        names = {name.split("/", 1)[1] for name in packed.getnames() if "/" in name}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "torch_ext/optimizer.py", "tf/optimizer.py",
            "tf/py.typed", "hvd_ext/versions.py"} <= names


def test_everything_imports_from_the_wheel(elsewhere: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = elsewhere / "venv" / "bin" / "python"
    names = [".".join((*name.split("/"), *path.relative_to(ROOT / folder).with_suffix("").parts))
             for name, folder in reversed(FOLDERS.items()) if name.removeprefix("hvd_ext/") not in LEFT_OUT
             for path in (ROOT / folder).rglob("*.py")]
    # Front ends first: Horovod loads the MPI of the running environment, which mpi4py then finds loaded.
    names = [name.removesuffix(".__init__") for name in names]
    if importlib.util.find_spec("lightning") is None:  # an extra of its own
        names.remove("hvd_ext.torch.lightning")
    # Triton is an extra of its own too, and crashes where TensorFlow has been imported before it.
    names = [name for name in names if name != "hvd_ext.torch.kernels_triton"]
    printed = call(python, "-c", IMPORT_ALL, *names, folder=elsewhere, environ=environ)
    found = json.loads(printed.splitlines()[-1])
    assert found["version"] == HVD_EXT
    strays = {name: place for name, place in found["places"].items()
              if not Path(place).is_relative_to(elsewhere / "venv")}
    assert strays == {}
    assert "hvd_ext.cli.main" in found["places"]
    command = elsewhere / "venv" / "bin" / "hvd-ext"
    assert HVD_EXT in call(command, "--version", folder=elsewhere, environ=environ)


@pytest.mark.skipif("torch" in LEFT_OUT, reason="the script's types are of hvd_ext.torch")
def test_mypy_sees_the_types_from_outside(elsewhere: Path) -> None:
    (elsewhere / "train.py").write_text(TYPED)
    (elsewhere / "mypy.ini").write_text(
        "[mypy]\n" + "".join(f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = True\n"
                             for name in ("torch", "tensorflow", "horovod", "keras")))
    python = elsewhere / "venv" / "bin" / "python"
    printed = call(sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--python-executable", python,
                   "--cache-dir", os.devnull, "train.py", folder=elsewhere)
    revealed = re.findall(r'Revealed type is "(.*)"', printed)
    assert revealed[0].endswith("DelayCompensated")
    assert revealed[1].endswith("float")
    assert "hvd_ext.reducers.buckets.TensorSpec" in revealed[2]

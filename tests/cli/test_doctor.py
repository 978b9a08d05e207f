"""The doctor: every mismatch is a problem with a command that fixes it, and nothing hangs."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hvd_ext.cli import doctor, environment, selftest
from hvd_ext.cli.cuda import Driver, Toolkit
from hvd_ext.cli.diagnosis import diagnose, usable_frameworks
from hvd_ext.cli.environment import Facts, Framework, read_metadata
from hvd_ext.cli.finding import Finding
from hvd_ext.cli.horovod_source import patch_id
from hvd_ext.cli.main import main
from hvd_ext.cli.selftest import launch_command, run_limited
from hvd_ext.cli.slurm import Slurm, look_for_slurm, parse_kinds
from hvd_ext.versions import HOROVOD, TENSORFLOW, TORCH

BUILT = {"mpi": True, "gloo": True, "nccl": False, "cuda": False}
TORCH_OK = Framework("torch", TORCH, horovod=BUILT)
TENSORFLOW_OK = Framework("tensorflow", TENSORFLOW, horovod=BUILT)
SIGNED = "horovod/runner/http/http_client.py"  # a file with a security edit
GOOD = Facts(
    python="3.11.7",
    cores=2,
    frameworks=(TORCH_OK, TENSORFLOW_OK),
    keras="3.15.1",
    horovod=HOROVOD,
    built_for={"torch": TORCH, "tensorflow": TENSORFLOW},
    mpirun="/env/bin/mpirun",
    mpirun_version="mpirun (Open MPI) 4.1.8",
    libmpi="/env/lib/libmpi.so.40",
    horovodrun="/env/bin/horovodrun",
    mpi4py="4.1.2",
    numba="0.68.1",
)
WITH_CUDA = replace(TORCH_OK, cuda="13.0", nccl="2.29.7")
GPU_MACHINE = replace(GOOD, gpu=True, frameworks=(replace(WITH_CUDA, gpus=1, horovod={
    **BUILT, "nccl": 22907, "cuda": 1}), TENSORFLOW_OK), horovod_cuda="13.0.88",
    driver=Driver("580.95.05", "13.0"), toolkit=Toolkit("13.2", "machine", Path("/usr/local/cuda")))
CRASHED = Framework("torch", TORCH, horovod_error="undefined symbol: _ZN3c10")
ABSENT = (Framework("torch"), Framework("tensorflow"))


def of_level(found: Facts, level: str) -> dict[str, Finding]:
    return {finding.subject: finding for finding in diagnose(found) if finding.level == level}


def test_a_good_machine_has_no_problem_and_no_note() -> None:
    assert of_level(GOOD, "problem") == {}
    assert of_level(GOOD, "note") == {}
    assert usable_frameworks(GOOD) == ["torch", "tensorflow"]


@pytest.mark.parametrize(
    ("found", "subject", "value", "remedy"),
    [
        (replace(GOOD, built_for={"torch": "2.9.0", "tensorflow": TENSORFLOW}),
         "Horovod for PyTorch", f"built for torch 2.9.0, installed is {TORCH}",
         "hvd-ext install-horovod"),
        (replace(GOOD, built_for={"torch": f"{TORCH}+cu126", "tensorflow": TENSORFLOW}),
         "Horovod for PyTorch", f"built for torch {TORCH}+cu126", "hvd-ext install-horovod"),
        (replace(GOOD, built_for={"torch": TORCH, "tensorflow": "2.12.0"}),
         "Horovod for TensorFlow", "built for tensorflow 2.12.0", "hvd-ext install-horovod"),
        (replace(GOOD, frameworks=(CRASHED, TENSORFLOW_OK)),
         "Horovod for PyTorch", "undefined symbol", "hvd-ext install-horovod --force"),
        (replace(GOOD, horovod=None, built_for={}),
         "Horovod", "not installed", "hvd-ext install-horovod"),
        (replace(GOOD, frameworks=ABSENT, horovod=None, built_for={}),
         "Horovod", "no framework", "pip install 'hvd-ext[torch]'"),
        (replace(GOOD, built_for={}, frameworks=(Framework("torch", TORCH), ABSENT[1])),
         "Horovod", "no installed framework can use it", "hvd-ext install-horovod"),
        (replace(GOOD, frameworks=(replace(TORCH_OK, error="no libc10.so", horovod=None),
                                   TENSORFLOW_OK)),
         "PyTorch", "no libc10.so", "pip install --force-reinstall"),
        (replace(GOOD, horovodrun=None), "Launcher", "no horovodrun", "--force"),
        (replace(GOOD, distutils=False), "Launcher", "distutils", "pip install 'setuptools<81'"),
        (replace(GOOD, python="3.9.18"), "Python", "3.10 or newer", "python3.12 -m venv"),
        (replace(GOOD, mpirun=None, frameworks=(
            replace(TORCH_OK, horovod={"mpi": True, "gloo": False}), ABSENT[1])),
         "MPI", "no mpirun", "hvd-ext install-horovod"),
        (replace(GOOD, kernels="fast"), "Kernels", "HVD_EXT_KERNELS=fast", "auto, plain, triton"),
        (replace(GOOD, unpatched=(SIGNED, "the compiled library")), "Horovod", "CVE-2024-10190",
         "hvd-ext install-horovod"),
        (replace(GOOD, horovod="0.27.0"), "Horovod", "CVE-2026-31234", "hvd-ext install-horovod"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_problem_names_the_mending_command(
    found: Facts, subject: str, value: str, remedy: str
) -> None:
    problem = of_level(found, "problem")[subject]
    assert value in problem.value
    assert remedy in problem.remedy


@pytest.mark.parametrize(
    ("found", "subject", "value"),
    [
        (replace(GOOD, frameworks=(TORCH_OK, ABSENT[1]), built_for={"torch": TORCH}),
         "TensorFlow", "not installed"),
        (replace(GOOD, built_for={"torch": TORCH}), "Horovod for TensorFlow", "not built"),
        (replace(GOOD, mpi4py=None), "mpi4py", "not installed"),
        (replace(GOOD, libmpi="/env/libmpi.so.40", mpi4py_libmpi="/usr/libmpi.so.12"), "mpi4py",
         "loads /usr/libmpi.so.12, Horovod /env/libmpi.so.40"),
        (replace(GOOD, slurm=Slurm("/usr/bin/srun", ("none", "pmi2"), True)), "SLURM", "it knows none, pmi2"),
        (replace(GOOD, slurm=Slurm("/usr/bin/srun", ("pmix_v4",), False)), "SLURM", "built without"),
        (replace(GOOD, mpirun=None), "MPI", "no mpirun"),  # Gloo is there
        (replace(GOOD, numba=None), "Kernels", "Numba's are faster"),
        (replace(GOOD, numba_error="Numba needs NumPy 2.4 or less"), "Kernels", "NumPy 2.4 or less"),
        (replace(GOOD, gpu=True), "GPU operations", "not built in"),
        (replace(GOOD, mpirun_version="mpirun (Open MPI) 5.0.11"), "Launcher", "Open MPI 5"),
        (replace(GOOD, mpirun="/usr/bin/mpirun"), "MPI", "but Horovod loads /env/lib"),
        (replace(GOOD, horovod="0.29.0"), "Horovod", "tested with"),
        (replace(GOOD, horovod="0.29.0", unpatched=(SIGNED,)), "Horovod", "tested with"),
        (replace(GOOD, unpatched=("horovod/torch/mpi_ops.py",)), "Horovod", "without the fixes"),
        (replace(GOOD, frameworks=(replace(TORCH_OK, version="2.12.0"), TENSORFLOW_OK),
                 built_for={"torch": "2.12.0", "tensorflow": TENSORFLOW}),
         "PyTorch", "tested with"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_note_is_no_problem(found: Facts, subject: str, value: str) -> None:
    assert of_level(found, "problem") == {}
    assert value in of_level(found, "note")[subject].value


OLD_LIST = """srun: MPI types are...
srun: pmi2
srun: none
srun: pmix
srun: pmix_v3"""
NEW_LIST = """MPI plugin types are...
\tnone
\tpmi2
\tpmix
specific pmix plugin versions available: pmix_v4,pmix_v5"""


def test_slurm_with_pmix_on_both_sides(tmp_path: Path) -> None:
    assert parse_kinds(OLD_LIST) == ("pmi2", "none", "pmix", "pmix_v3")
    assert parse_kinds(NEW_LIST) == ("none", "pmi2", "pmix", "pmix_v4", "pmix_v5")
    for name, text in [("srun", NEW_LIST), ("ompi_info", "mca:pmix:isolated:v\nmca:pmix:pmix3x:v")]:
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\ncat <<END\n{text}\nEND\n")
        program.chmod(0o755)
    found = look_for_slurm(str(tmp_path / "srun"), str(tmp_path / "mpirun"), 4)
    assert found == Slurm(str(tmp_path / "srun"), parse_kinds(NEW_LIST), pmix=True)
    assert look_for_slurm(None, None, 4) is None
    told = of_level(replace(GOOD, slurm=found), "ok")["SLURM"]
    assert told.value == f"srun --mpi=pmix ({tmp_path / 'srun'})"
    alone = replace(GOOD, slurm=found, frameworks=(replace(TORCH_OK, horovod={"gloo": True}), ABSENT[1]))
    assert "built without MPI" in of_level(alone, "note")["SLURM"].value


def test_which_kernels_are_used() -> None:
    assert of_level(GOOD, "ok")["Kernels"].value == "compiled by Numba 0.68.1"
    assert "not tested on a GPU" in of_level(replace(GOOD, kernels="triton"), "ok")["Kernels"].value
    plain = of_level(replace(GOOD, kernels="plain", numba=None), "ok")["Kernels"]
    assert "HVD_EXT_KERNELS=plain" in plain.value


def test_a_good_gpu_machine_and_its_releases() -> None:
    assert of_level(GPU_MACHINE, "problem") == of_level(GPU_MACHINE, "note") == {}
    told = of_level(GPU_MACHINE, "ok")
    assert told["GPU"].value == "driver 580.95.05, for CUDA up to 13.0"
    assert told["CUDA"].value == "PyTorch 13.0, Horovod 13.0.88, toolkit of this machine 13.2"
    assert told["GPU operations"].value == "NCCL, compiled for 2.29.7"


def test_cuda_torch_without_gpu_operations() -> None:
    no_gpu = replace(GOOD, frameworks=(WITH_CUDA, ABSENT[1]), built_for={"torch": TORCH})
    found = of_level(no_gpu, "ok")["GPU operations"]
    assert "Horovod refuses PyTorch's tensors on a GPU" in found.value
    assert found.remedy == "hvd-ext install-horovod --gpu"
    with_gpu = replace(no_gpu, gpu=True, driver=Driver("580.95.05", "13.0"))
    assert of_level(with_gpu, "note")["GPU operations"].remedy == "hvd-ext install-horovod --gpu"


@pytest.mark.parametrize(
    ("found", "level", "subject", "value"),
    [
        (replace(GPU_MACHINE, driver=Driver("550.1", "12.4")), "problem", "GPU", "PyTorch needs CUDA 13.0"),
        (replace(GPU_MACHINE, driver=Driver("550.1", "12.9")), "problem", "GPU", "PyTorch needs CUDA 13.0"),
        (replace(GPU_MACHINE, horovod_cuda="12.8.9"), "problem", "CUDA", "Horovod 12.8.9"),
        (replace(GPU_MACHINE, frameworks=(replace(GPU_MACHINE.frameworks[0], nccl="2.27.3"), TENSORFLOW_OK)),
         "problem", "GPU operations", "two NCCLs: PyTorch loads 2.27.3"),
        (replace(GPU_MACHINE, frameworks=(replace(GPU_MACHINE.frameworks[0], nccl="2.30.1"), TENSORFLOW_OK)),
         "note", "GPU operations", "two NCCLs: PyTorch loads 2.30.1"),
        (replace(GPU_MACHINE, frameworks=(replace(GPU_MACHINE.frameworks[0], cuda="13.2"), TENSORFLOW_OK)),
         "note", "GPU", "of which the driver runs what is compiled already"),
        (replace(GPU_MACHINE, frameworks=(replace(GPU_MACHINE.frameworks[0], horovod={**BUILT, "cuda": 1}),
                                          TENSORFLOW_OK)),
         "note", "GPU operations", "through the CPU"),
    ],
)
def test_what_is_wrong_with_a_gpu_machine(found: Facts, level: str, subject: str, value: str) -> None:
    assert value in of_level(found, level)[subject].value


def test_a_problem_without_a_way_out_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="needs a remedy"):
        Finding("MPI", "broken", "problem")


def horovod_package(folder: Path, metadata: str | None) -> Path:
    """An installed Horovod as the doctor sees it: a package folder with its metadata."""
    package = folder / "horovod"
    package.mkdir()
    if metadata is not None:
        (package / "metadata.json").write_text(metadata)
    return package


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ('{\n"tensorflow": "2.21.0",\n"pytorch": "2.13.0+cpu",\n"dummy": "none"\n}',
         {"tensorflow": "2.21.0", "torch": "2.13.0+cpu"}),
        ('{"dummy": "none"}', {}),
        ('{"pytorch": "2.13.0"', {}),
        (None, {}),
    ],
)
def test_metadata_of_an_installed_horovod(
    tmp_path: Path, metadata: str | None, expected: dict[str, str]
) -> None:
    assert read_metadata(horovod_package(tmp_path, metadata)) == expected
    assert read_metadata(None) == {}


@pytest.mark.parametrize(("edits", "expected"),
                         [(patch_id(), []), ("0123456789ab", ["the compiled library"])])
def test_a_library_built_with_other_edits_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edits: str, expected: list[str]
) -> None:
    monkeypatch.setattr(environment, "EDITS", ())
    package = horovod_package(tmp_path, f'{{"hvd_ext_edits": "{edits}"}}')
    assert environment.unpatched_parts(package) == expected


@pytest.mark.parametrize(("built", "status"), [(TORCH, 0), ("1.13.1", 1)])
def test_exit_status_follows_the_metadata(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    built: str,
    status: int,
) -> None:
    package = horovod_package(tmp_path, json.dumps({"pytorch": built, "dummy": "none"}))
    monkeypatch.setattr(environment, "horovod_folder", lambda: package)
    monkeypatch.setattr(environment, "unpatched_parts", lambda folder: [])
    monkeypatch.setattr(environment, "loaded_libmpi", lambda folder: "")
    monkeypatch.setattr(environment, "find_program", lambda name: f"/env/bin/{name}")
    monkeypatch.setattr(environment, "_inspect_framework", lambda name, horovod, limit: (
        TORCH_OK if name == "torch" else Framework(name)))
    monkeypatch.setattr(environment.toolchain, "distribution_version", lambda name: HOROVOD)
    assert main(["doctor", "--json", "--no-selftest"]) == status
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is (status == 0)
    found = {row["subject"]: row for row in report["findings"]}
    row = found["Horovod for PyTorch"]
    assert row["level"] == ("problem" if status else "ok")
    assert (row["remedy"] == "hvd-ext install-horovod") is bool(status)

    assert main(["doctor", "--no-selftest"]) == status
    table = capsys.readouterr().out
    assert "Horovod for PyTorch" in table
    assert ("Problems: 1." in table) is bool(status)


@pytest.mark.parametrize(
    ("horovod", "error", "horovod_error"),
    [
        ("raise ImportError('undefined symbol: x')", "", "ImportError: undefined symbol: x"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "", "crashed (signal 11)"),
        ("import time; time.sleep(600)", "", "longer than 2 s"),
        ("print('{{\"mpi\": true}}')", "", ""),
    ],
)
def test_import_in_its_own_process(
    monkeypatch: pytest.MonkeyPatch, horovod: str, error: str, horovod_error: str
) -> None:
    first = "print('{\"version\": \"1.2\", \"cuda\": null, \"gpus\": 0}', flush=True)\n"
    monkeypatch.setattr(environment.toolchain, "installed_version", lambda name: "1.2")
    monkeypatch.setitem(environment._FRAMEWORK_PROBES, "torch", first)
    monkeypatch.setattr(environment, "_HOROVOD_PROBE", horovod)
    found = environment._inspect_framework("torch", "0.28.1", 2.0 if "sleep" in horovod else 60.0)
    assert (found.version, found.error) == ("1.2", error)
    assert horovod_error in found.horovod_error
    assert (found.horovod == {"mpi": True}) is not bool(horovod_error)

    monkeypatch.setitem(environment._FRAMEWORK_PROBES, "torch", "raise OSError('libc10.so')\n")
    broken = environment._inspect_framework("torch", "0.28.1", 60.0)
    assert (broken.version, broken.horovod) == ("1.2", None)
    assert "libc10.so" in broken.error


def test_problems_leave_the_self_test_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "collect_facts", lambda: replace(GOOD, horovod=None, built_for={}))
    monkeypatch.setattr(doctor, "allreduce", lambda *_: pytest.fail("must not start ranks"))
    assert doctor.run_diagnosis(selftest=True, limit=1.0)[-1].subject == "Self-test"


def test_timeout_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--timeout", "0"]) == 1
    assert "--timeout must be above 0 seconds, got 0" in capsys.readouterr().err


def test_launch_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest.os, "geteuid", lambda: 0)
    command = launch_command(GOOD, ["prog"])
    assert command is not None
    assert command[:3] == ["/env/bin/mpirun", "-np", "2"]
    assert command[-1] == "prog"
    assert {"--allow-run-as-root", "--oversubscribe"} <= set(command)

    monkeypatch.setattr(selftest.os, "geteuid", lambda: 1000)
    assert "--allow-run-as-root" not in (launch_command(GOOD, ["prog"]) or [])
    mpich = replace(GOOD, mpirun_version="HYDRA build details:")
    assert launch_command(mpich, ["prog"]) == ["/env/bin/mpirun", "-np", "2", "prog"]

    gloo = replace(GOOD, mpirun=None)
    assert launch_command(gloo, ["p"]) == ["/env/bin/horovodrun", "--gloo", "-np", "2", "p"]
    assert launch_command(replace(gloo, horovodrun=None), ["p"]) is None


def test_what_hangs_is_killed_with_its_children() -> None:
    child = "import time; print('child', flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    status, printed = run_limited([sys.executable, "-c", parent], 2.0)
    assert status is None
    assert "child" in printed
    assert time.monotonic() - started < 60  # ended by the limit, not by the child


def test_failing_ranks_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(status: int | None, printed: str) -> Finding:
        monkeypatch.setattr(selftest, "run_limited", lambda command, limit: (status, printed))
        return selftest.allreduce(GOOD, "torch", 3.0)

    done = selftest.DONE
    assert pretend(0, f"{done} 0\n{done} 1\n").level == "ok"
    assert "1 of 2 ranks" in pretend(0, f"{done} 0\n").value
    failed = pretend(1, f"{done} 0\nTraceback ...\nImportError: libmpi.so.40\n")
    assert failed.level == "problem"
    assert "ImportError: libmpi.so.40" in failed.value
    assert "no answer within 3 s" in pretend(None, "").value


@pytest.mark.distributed
@pytest.mark.smoke
def test_doctor_finds_this_environment_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == 0, report
    tests = [row for row in report["findings"] if row["subject"].startswith("Self-test")]
    assert tests
    assert all("allreduce on 2 ranks" in row["value"] for row in tests)

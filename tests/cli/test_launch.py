"""The launched line for each launcher, and two real ranks by each that is here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hvd_ext.cli.console import CliError
from hvd_ext.cli.launch import Host, LaunchCommand, MachineInfo, choose_launcher, detect_machine, parse_hosts
from hvd_ext.cli.main import main

ROOT = Path(__file__).parents[2]
TWO = [Host("h1", 2), Host("h2", 2)]
HERE = [Host("localhost", 2)]
PROGRAM = ["python", "train.py"]
LAUNCHERS = {"mpirun": "/opt/mpi/bin/mpirun", "horovodrun": "/env/bin/horovodrun", "srun": "/usr/bin/srun"}
CLUSTER = MachineInfo(LAUNCHERS, mpi="mpirun (Open MPI) 4.1.8", prefix="/opt/mpi")
WHEEL = replace(CLUSTER, prefix="/env", wheel=True, root=True)
RANK = """
import os, sys, torch, hvd_ext.torch as hvd
hvd.init()
total = hvd.allreduce(torch.ones(3) * (hvd.rank() + 1), op=hvd.Sum)
sys.stdout.write(f"rank {hvd.rank()} of {hvd.size()}: {total.tolist()} {os.environ.get('HVD_EXT_PASSED')}\\n")
"""


def line(hosts: list[Host], machine: MachineInfo, **options: object) -> LaunchCommand:
    return choose_launcher(hosts, PROGRAM, machine,
                           environ={"PATH": "/x", "HOME": "/root", "NCCL_DEBUG": "INFO"},
                           **options)  # type: ignore[arg-type]


def after(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_hosts() -> None:
    assert parse_hosts("h1:2, h2") == [Host("h1", 2), Host("h2", 1)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [("h1:0", "at least 1"), ("h1:x", "at least 1"), (":2", "not HOST:RANKS"), ("", "not HOST:RANKS"),
     ("h1:1,h1:1", "more than once")],
)
def test_wrong_hosts(text: str, problem: str) -> None:
    with pytest.raises(CliError, match=problem):
        parse_hosts(text)


def test_mpirun_over_hosts() -> None:
    command = line(TWO, CLUSTER).command
    assert command[0] == "/opt/mpi/bin/mpirun"
    assert after(command, "-np") == "4"
    assert after(command, "-H") == "h1:2,h2:2"
    assert after(command, "--prefix") == "/opt/mpi"
    assert command[-2:] == PROGRAM
    forwarded = [command[k + 1] for k, word in enumerate(command) if word == "-x"]
    assert forwarded == ["NCCL_DEBUG", "PATH"]
    assert "--allow-run-as-root" not in command
    assert "--oversubscribe" not in command  # only when asked for
    assert "--prefix" not in line(HERE, CLUSTER).command


def test_mpirun_of_the_wheel_as_root() -> None:
    made = line(TWO, WHEEL, oversubscribe=True)
    assert made.variables == {"OPAL_PREFIX": "/env"}
    assert "OPAL_PREFIX" in made.command
    assert after(made.command, "--prefix") == "/env"
    assert {"--allow-run-as-root", "--oversubscribe"} <= set(made.command)
    assert str(made).startswith("OPAL_PREFIX=/env /opt/mpi/bin/mpirun -np 4")


@pytest.mark.parametrize("network", ["eth0", "eth0,eth1", "10.0.0.0/24"])
def test_network_of_mpirun(network: str) -> None:
    made = line(TWO, CLUSTER, network=network)
    assert after(made.command, "btl_tcp_if_include") == network
    assert after(made.command, "oob_tcp_if_include") == network
    named = "/" not in network
    assert made.variables.get("NCCL_SOCKET_IFNAME") == (network if named else None)
    assert ("NCCL_SOCKET_IFNAME" in made.command) == named


def test_open_mpi_5_has_other_names() -> None:
    command = line(TWO, replace(CLUSTER, mpi="mpirun (Open MPI) 5.0.11"), network="eth0",
                   oversubscribe=True).command
    assert after(command, "prte_if_include") == "eth0"
    assert "oob_tcp_if_include" not in command
    assert after(command, "--map-by") == "slot:OVERSUBSCRIBE"
    assert "--oversubscribe" not in command


@pytest.mark.parametrize(
    ("machine", "way"),
    [(CLUSTER, "--mpi"), (replace(CLUSTER, horovod_mpi=False), "--gloo"),
     (replace(CLUSTER, launchers={"horovodrun": "/env/bin/horovodrun"}), "--gloo"),
     (replace(CLUSTER, mpi="mpirun (Open MPI) 5.0.11"), "--gloo")],
)
def test_horovodrun(machine: MachineInfo, way: str) -> None:
    made = line(TWO, machine, launcher="horovodrun", network="eth0")
    command = made.command
    assert made.variables == ({"PATH": "/opt/mpi/bin:/x"} if way == "--mpi" else {})
    assert command[:6] == ["/env/bin/horovodrun", way, "-np", "4", "-H", "h1:2,h2:2"]
    assert after(command, "--network-interfaces") == "eth0"
    assert command[-2:] == PROGRAM


def test_without_mpi_horovodrun_is_the_default() -> None:
    assert line(TWO, replace(CLUSTER, horovod_mpi=False)).command[0] == "/env/bin/horovodrun"


def test_srun() -> None:
    made = line(TWO, WHEEL, launcher="srun", network="ib0", oversubscribe=True)
    assert made.command == ["/usr/bin/srun", "--mpi=pmix", "--ntasks=4", "--ntasks-per-node=2",
                            "--nodelist=h1,h2", "--overcommit", *PROGRAM]
    assert made.variables == {"OPAL_PREFIX": "/env", "OMPI_MCA_btl_tcp_if_include": "ib0",
                              "NCCL_SOCKET_IFNAME": "ib0", "HOROVOD_GLOO_IFACE": "ib0"}


@pytest.mark.parametrize(
    ("machine", "options", "problem"),
    [
        (replace(CLUSTER, launchers={}), {}, "no horovodrun here|no mpirun here"),
        (CLUSTER, {"launcher": "horovodrun", "network": "10.0.0.0/24"}, "names of interfaces only"),
        (CLUSTER, {"network": "10.0.0.0/99"}, "10.0.0.0/99"),
        (replace(CLUSTER, horovod_mpi=False), {"launcher": "mpirun"}, "built without MPI"),
        (replace(CLUSTER, horovod_mpi=False), {"launcher": "srun"}, "built without MPI"),
        (replace(CLUSTER, mpi="HYDRA build details:"), {"launcher": "mpirun"}, "no Open MPI"),
    ],
)
def test_what_cannot_be_launched(machine: MachineInfo, options: dict[str, str], problem: str) -> None:
    with pytest.raises(CliError, match=problem):
        line(TWO, machine, **options)


def test_srun_needs_the_same_number_on_each_host() -> None:
    with pytest.raises(CliError, match="same number of ranks"):
        line([Host("h1", 2), Host("h2", 1)], CLUSTER, launcher="srun")


def test_no_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--hosts", "localhost:2", "--"]) == 1
    assert "no program to launch" in capsys.readouterr().err


def test_dry_run_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--hosts", "h1:2,h2:2", "--dry-run", "--", "python", "a b.py", "--lr", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert printed.rstrip().endswith("python 'a b.py' --lr 0.1")
    assert "h1:2,h2:2" in printed


@pytest.mark.parametrize("launcher", ["srun", "horovodrun"])
def test_a_line_for_another_machine_needs_no_launcher_here(
        launcher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("hvd_ext.cli.launch.detect_machine", lambda: replace(CLUSTER, launchers={}))
    words = ["launch", "--hosts", "h1:2,h2:2", "--launcher", launcher]
    assert main([*words, "--dry-run", "--", *PROGRAM]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{launcher} --")
    assert printed.out.rstrip().endswith("python train.py")
    assert f"no {launcher} here" in printed.err
    assert main([*words, "--", *PROGRAM]) == 1
    assert f"no {launcher} here" in capsys.readouterr().err


def test_a_line_of_mpirun_depends_on_which_it_is(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("hvd_ext.cli.launch.detect_machine", lambda: replace(CLUSTER, launchers={}))
    assert main(["launch", "--launcher", "mpirun", "--dry-run", "--", *PROGRAM]) == 1
    assert "no mpirun here" in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_two_ranks_of_this_machine(launcher: str, tmp_path: Path) -> None:
    if launcher not in detect_machine().launchers:
        pytest.skip(f"no {launcher} here")
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "hvd_ext.cli.main", "launch", "--hosts", "localhost:2",
               "--launcher", launcher, "--oversubscribe", "--network", "lo", "--", sys.executable,
               str(tmp_path / "rank.py")]
    environ = {**os.environ, "HVD_EXT_PASSED": "yes", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank} of 2: [3.0, 3.0, 3.0] yes" in done.stdout
    failing = subprocess.run([*command[:-1], "-c", "raise SystemExit(3)"], cwd=ROOT, env=environ,
                             capture_output=True, text=True, timeout=120)
    assert failing.returncode != 0

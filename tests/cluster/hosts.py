"""A cluster on one machine: hosts that know each other only over links of a given rate.

Each host is a network namespace with a host name of its own; their links meet in one more namespace,
the switch. Nothing leads out of it. Root is needed, and ``ip`` and ``tc`` (package iproute2)::

    with Cluster(3, rate="1gbit") as cluster:
        with cluster.ranks() as ranks:                  # one rank a host, under mpirun
            ranks.run(train)
            cluster.cut(3)                              # host 3 vanishes

Names carry the process that made them and when it started. What a killed process has left is removed
when the next cluster is made.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.ranks import Ranks

PREFIX = "hvdext"
INTERFACE = "eth0"
RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
MOST_HOSTS = 64
FORWARDED = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "HOROVOD_CYCLE_TIME", "TF_CPP_MIN_LOG_LEVEL")
_NUMBERS = itertools.count()

ENTER = """#!/bin/sh
# HOST COMMAND...: a shell's command line on a host of the cluster, as rsh runs it; ssh's options are skipped.
host=
while :; do case $1 in
    -o|-p|-i|-l) shift 2;;
    -*) shift;;
    *) if [ -n "$host" ]; then break; fi; host=$1; shift;;  # Horovod has options before and after the host
esac; done
exec ip netns exec {namespace}-"$host" unshare --uts sh -c 'hostname "$0" && exec sh -c "$1"' "$host" "$*"
"""


def missing() -> str | None:
    """Why no cluster can be made on this machine; None where it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root: run it as root, in a container or a virtual machine"
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(tool) is None:
            return f"{tool} is not installed: apt-get install {package}"
    name = f"{PREFIX}-{os.getpid()}-{_started(os.getpid())}-probe"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", name, "link", "add", "p", "type", "veth", "peer", "name", "q")
        _run("tc", "-n", name, "qdisc", "add", "dev", "p", "root", *_shape("1gbit"))
    except ClusterError as error:
        return f"this kernel cannot do it: {error}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
    return None


class ClusterError(RuntimeError):
    """A command that makes the cluster failed; says which and why."""


def bits_per_second(rate: str) -> float:
    """``"100mbit"`` as a number.

    Raises:
        ValueError: it is not a number with kbit, mbit or gbit behind it.
    """
    found = re.fullmatch(r"([0-9.]+)(kbit|mbit|gbit)", rate)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f'rate must be a number and kbit, mbit or gbit, such as "1gbit"; got {rate!r}')
    return float(found[1]) * RATES[found[2]]


class Cluster:
    """Hosts ``node1``, ``node2``, ... on a switch of their own.

    Args:
        hosts: how many.
        rate: of each host's link in either direction, as ``tc`` writes it; None for no limit.
        resolve: hosts know each other's names.

    Raises:
        ClusterError: it cannot be made; :func:`missing` says why beforehand.
    """

    def __init__(self, hosts: int, *, rate: str | None = "1gbit", resolve: bool = True) -> None:
        if not 1 <= hosts <= MOST_HOSTS:
            raise ValueError(f"hosts must be 1 to {MOST_HOSTS}, got {hosts}")
        if rate is not None:
            bits_per_second(rate)
        reap()
        number = next(_NUMBERS)
        self.namespace = f"{PREFIX}-{os.getpid()}-{_started(os.getpid())}-{number}"
        self.network = f"10.{64 + os.getpid() % 128}.{(os.getpid() // 128 + number) % 256}"
        self.hosts = [f"node{k}" for k in range(1, hosts + 1)]
        self.rate = rate
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.namespace}-"))
        atexit.register(self.close)
        try:
            self._make(resolve)
        except BaseException:
            self.close()
            raise

    def _make(self, resolve: bool) -> None:
        switch = f"{self.namespace}-switch"
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        known = "127.0.0.1 localhost\n" + "".join(
            f"{self.address(host)} {host}\n" for host in self.hosts if resolve)
        for number, host in enumerate(self.hosts, 1):
            inside, port = f"{self.namespace}-{host}", f"port{number}"
            _run("ip", "netns", "add", inside)
            files = Path("/etc/netns") / inside  # `ip netns exec` puts them in the place of /etc's
            files.mkdir(parents=True)
            (files / "hosts").write_text(known)
            _run("ip", "-n", inside, "link", "add", INTERFACE, "type", "veth", "peer", "name", port,
                 "netns", switch)
            _run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
            _run("ip", "-n", inside, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                _run("ip", "-n", inside, "link", "set", device, "up")
            if self.rate is not None:
                for where, device in ((inside, INTERFACE), (switch, port)):
                    _run("tc", "-n", where, "qdisc", "add", "dev", device, "root", *_shape(self.rate))
        for tool in ("enter", "ssh"):
            path = self.folder / "bin" / tool
            path.parent.mkdir(exist_ok=True)
            path.write_text(ENTER.format(namespace=self.namespace))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def address(self, host: str) -> str:
        """The host's IPv4 address."""
        return f"{self.network}.{self.hosts.index(host) + 1}"

    def on(self, host: str, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` on a host."""
        return ["ip", "netns", "exec", f"{self.namespace}-{host}", "unshare", "--uts", "sh", "-c",
                'hostname "$0" && exec "$@"', host, *command]

    def environment(self) -> dict[str, str]:
        """What a launcher needs beside this process's environment: the replaced ``ssh`` comes first."""
        tools = Path(sys.executable).parent
        return {"PATH": f"{self.folder / 'bin'}:{tools}:{os.environ['PATH']}"}

    def mpirun(self, size: int, command: Sequence[str], options: Iterable[str] = ()) -> list[str]:
        """Start ``command`` on ``size`` ranks, evenly over the hosts, with mpirun on the first."""
        own = Path(sys.executable).parent / "mpirun"  # of the wheel, perhaps in another environment
        prefix = ["--prefix", str(own.resolve().parent.parent)] if own.exists() else []
        subnet = f"{self.network}.0/24"
        line = ["mpirun", "--allow-run-as-root", "--bind-to", "none", *prefix, "-H", self._slots(size),
                "--mca", "plm_rsh_agent", str(self.folder / "bin" / "enter"),
                "--mca", "oob_tcp_if_include", subnet, "--mca", "btl_tcp_if_include", subnet,
                "--mca", "btl", "tcp,self,vader", "--mca", "orte_tmpdir_base", str(self.folder)]
        for name in FORWARDED:
            line += ["-x", name]
        return self.on(self.hosts[0], [*line, *options, "-np", str(size), *command])

    def horovodrun(self, size: int, command: Sequence[str],
                   options: Iterable[str] = ("--gloo",)) -> list[str]:
        """The same with horovodrun."""
        return self.on(self.hosts[0], ["horovodrun", *options, "-np", str(size), "-H", self._slots(size),
                                       *command])

    def _slots(self, size: int) -> str:
        each, rest = divmod(size, len(self.hosts))
        return ",".join(f"{host}:{each + (number < rest)}" for number, host in enumerate(self.hosts)
                        if each + (number < rest))

    def ranks(self, size: int | None = None, *, launcher: str = "mpirun",
              options: Sequence[str] | None = None, env: dict[str, str] | None = None, **more: Any) -> Ranks:
        """Running ranks over the hosts, one a host unless ``size`` says otherwise.

        Args:
            launcher: "mpirun" or "horovodrun".
            options: further ones of the launcher.
            env: further environment variables.
            more: of :class:`tests.ranks.Ranks`.
        """
        start = {"mpirun": self.mpirun, "horovodrun": self.horovodrun}[launcher]
        extra = {} if options is None else {"options": options}
        if launcher == "mpirun":
            extra = {"options": [*(options or ()), *(word for name in env or () for word in ("-x", name))]}
        return Ranks(len(self.hosts) if size is None else size,
                     launcher=lambda size, command: start(size, command, **extra),
                     env={**self.environment(), **(env or {})}, **more)

    def cut(self, host: str) -> None:
        """Take a host's link down: it is there, and nobody hears from it."""
        _run("ip", "-n", f"{self.namespace}-{host}", "link", "set", INTERFACE, "down")

    def mend(self, host: str) -> None:
        """Bring a link up again."""
        _run("ip", "-n", f"{self.namespace}-{host}", "link", "set", INTERFACE, "up")

    def close(self) -> None:
        """Kill what runs on the hosts and remove them."""
        atexit.unregister(self.close)
        _remove(self.namespace)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def sent_bytes() -> int:
    """What this process's host has sent over its link so far."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == INTERFACE:
            return int(counts.split()[8])
    raise ClusterError(f"no interface {INTERFACE} here: not a host of a cluster")


def reap() -> list[str]:
    """Remove what processes that are gone have left; the common part of the names of each cluster."""
    gone = []
    for name in sorted({found[0] for one in _namespaces()
                        if (found := re.match(rf"{PREFIX}-(\d+)-(\d+)-(\d+|probe)", one))}):
        pid, began = name.split("-")[1:3]
        if _started(int(pid)) != began:
            _remove(name)
            for folder in Path(tempfile.gettempdir()).glob(f"{name}-*"):
                shutil.rmtree(folder, ignore_errors=True)
            gone.append(name)
    return gone


def _remove(common: str) -> None:
    names = [one for one in _namespaces() if one == common or one.startswith(f"{common}-")]
    for _ in range(20):
        pids = [pid for one in names for pid in _output("ip", "netns", "pids", one).split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if not pids:
            break
        time.sleep(0.05)
    for one in names:
        subprocess.run(["ip", "netns", "delete", one], check=False, capture_output=True)
        shutil.rmtree(Path("/etc/netns") / one, ignore_errors=True)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _output("ip", "netns", "list").splitlines() if line]


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did; "" when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _shape(rate: str) -> list[str]:
    burst = max(256 * 1024, int(bits_per_second(rate) / 8 / 250))  # what passes between two ticks
    return ["tbf", "rate", rate, "burst", str(burst), "latency", "100ms"]


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def _output(*command: str) -> str:
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout


if __name__ == "__main__":  # `make test-cluster` asks first
    reason = missing()
    if reason:
        print(f"no cluster can be made here: {reason}", file=sys.stderr)
        raise SystemExit(1)

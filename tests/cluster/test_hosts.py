"""The cluster itself: made, apart from others, and gone whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.cluster import programs
from tests.cluster.hosts import Cluster, bits_per_second, missing, reap
from tests.ranks import ROOT

pytestmark = pytest.mark.cluster


def namespaces(pattern=""):
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if pattern in line]


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def said_on(cluster, host, *command):
    done = subprocess.run(cluster.on(host, command), capture_output=True, text=True, check=False)
    return done.stdout.strip()


def test_hosts_have_names_and_reach_only_each_other():
    with Cluster(2, rate="100mbit") as one, Cluster(2, rate=None) as other:
        assert said_on(one, "node2", "hostname") == "node2"
        assert one.network != other.network
        answers = said_on(one, "node1", "sh", "-c", "getent hosts node2; ip route")
        assert one.address("node2") in answers
        assert "default" not in answers
        for target, reached in ((one.address("node2"), True), (other.address("node2"), False),
                                ("192.0.2.1", False)):
            probe = ("import socket, sys\ntry: socket.create_connection((sys.argv[1], 9), timeout=2)\n"
                     "except ConnectionRefusedError: print('there')\nexcept OSError: print('not')")
            wanted = "there" if reached else "not"
            assert said_on(one, "node1", sys.executable, "-c", probe, target) == wanted
        one.cut("node2")
        assert said_on(one, "node1", sys.executable, "-c", probe, one.address("node2")) == "not"
        names = namespaces(one.namespace) + namespaces(other.namespace)
        assert len(names) == 6
    assert not set(namespaces()) & set(names)
    assert not one.folder.exists()


def test_what_a_killed_process_left_is_removed_at_the_next_start():
    program = textwrap.dedent("""
        import subprocess, time
        from tests.cluster.hosts import Cluster
        cluster = Cluster(2)
        child = subprocess.Popen(cluster.on("node1", ["sleep", "600"]), start_new_session=True)
        print(cluster.namespace, flush=True)
        time.sleep(600)
    """)
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    name = process.stdout.readline().strip()
    assert len(namespaces(name)) == 3
    assert not [gone for gone in reap() if gone == name]  # it is alive: left alone
    assert len(namespaces(name)) == 3
    time.sleep(0.2)
    sleeping = subprocess.run(["ip", "netns", "pids", f"{name}-node1"], capture_output=True, text=True,
                              check=True).stdout.split()
    assert sleeping
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert name in reap()
    assert namespaces(name) == []
    assert not [pid for pid in sleeping if runs(pid)]


@pytest.mark.parametrize("rate", ["fast", "0gbit", "1 gbit", ""])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="rate must be a number and kbit, mbit or gbit"):
        Cluster(2, rate=rate)


def test_rates():
    assert bits_per_second("100mbit") == 1e8
    assert bits_per_second("2.5gbit") == 2.5e9
    assert missing() is None


def test_a_link_carries_no_more_than_its_rate():
    """A link of 100 Mbit/s is slower than what it must be, however busy this machine is."""
    numel = 1_000_000
    with Cluster(2, rate="100mbit") as cluster, cluster.ranks() as ranks:
        for sent, seconds in ranks.run(programs.moved, numel):
            assert sent >= 4 * numel  # each of two ranks sends the whole, at least
            burst = 2 * 256 * 1024
            assert seconds >= (4 * numel - burst) * 8 / 100e6

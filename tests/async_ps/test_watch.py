"""Noticing that a process has ended, and what the server's terminal shows."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from hvd_ext.async_ps.liveness import LOCAL, LivenessClient, LivenessServer
from hvd_ext.async_ps.progress import Display
from hvd_ext.async_ps.report import Delays, Report, WorkerReport


def connected(ranks):
    host = LivenessServer(local=True)
    guests = {rank: LivenessClient(rank, addresses=["256.0.0.1", LOCAL], port=host.port, token=host.token,
                                   seconds=2.0) for rank in ranks}
    assert host.accept_ranks(set(ranks), seconds=5.0) == set()
    return host, guests


def soon(question, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not question() and time.monotonic() < deadline:
        time.sleep(0.01)
    return question


def test_both_ends_notice_the_other(tmp_path):
    host, guests = connected([1, 2, 3])
    assert host.dead_ranks() == []
    assert not any(guest.primary_lost() for guest in guests.values())
    guests[2].close()
    found = []
    soon(lambda: found.extend(host.dead_ranks()) or found)
    assert found == [2]
    assert host.dead_ranks() == []
    host.forget_rank(3)
    soon(guests[3].primary_lost)
    assert guests[3].primary_lost()
    assert not guests[1].primary_lost()
    host.close()
    soon(guests[1].primary_lost)
    assert guests[1].primary_lost()


def test_a_killed_process_is_noticed():
    host = LivenessServer(local=True)
    code = (
        "import sys, time; from hvd_ext.async_ps.liveness import LivenessClient;"
        f"guest = LivenessClient(5, addresses=['{LOCAL}'], port={host.port}, token='{host.token}',"
        " seconds=5.0); print('there', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert host.accept_ranks({5}, seconds=20.0) == set()
    assert host.dead_ranks() == []
    process.kill()
    process.wait()
    found = []
    soon(lambda: found.extend(host.dead_ranks()) or found)
    assert found == [5]
    host.close()


WITH_A_CHILD = """
import os, sys, time
from hvd_ext.async_ps.liveness import LivenessClient
client = LivenessClient(5, addresses=["127.0.0.1"], port=int(sys.argv[1]), token=sys.argv[2], seconds=5.0)
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


def test_a_killed_process_is_noticed_whose_child_lives_on():
    host = LivenessServer(local=True)
    process = subprocess.Popen([sys.executable, "-c", WITH_A_CHILD, str(host.port), host.token],
                               stdout=subprocess.PIPE)
    assert host.accept_ranks({5}, seconds=60.0) == set()
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    found = []
    try:
        soon(lambda: found.extend(host.dead_ranks()) or found)
    finally:
        os.kill(child, signal.SIGKILL)
    assert found == [5]
    host.close()


def test_a_child_that_ends_leaves_its_parent_the_connections():
    host, clients = connected([1, 2])
    child = os.fork()
    if not child:
        host.close()  # as at the end of a process
        os._exit(0)
    os.waitpid(child, 0)
    assert host.dead_ranks() == []
    clients[2].close()
    found = []
    soon(lambda: found.extend(host.dead_ranks()) or found)
    assert found == [2]
    host.close()


def test_strangers_are_not_let_in():
    host = LivenessServer(local=True)
    for said in (b"nonsense 1".ljust(64), b"", f"{host.token} one".encode().ljust(64)):
        with socket.create_connection((LOCAL, host.port)) as stranger:
            stranger.sendall(said)
    guest = LivenessClient(1, addresses=[LOCAL], port=host.port, token=host.token, seconds=2.0)
    assert host.accept_ranks({1, 2}, seconds=1.5) == {2}
    assert host.dead_ranks() == []
    guest.close()
    host.close()


def test_many_silent_strangers_keep_no_rank_out():
    host = LivenessServer(local=True)
    crowd = [socket.create_connection((LOCAL, host.port)) for _ in range(300)]
    for number, stranger in enumerate(crowd):
        stranger.sendall(host.token.encode()[: number % 17])  # silent, or the beginning of the token
    guests = [LivenessClient(rank, addresses=[LOCAL], port=host.port, token=host.token, seconds=2.0)
              for rank in (1, 2)]
    assert host.accept_ranks({1, 2}, seconds=10.0) == set()
    assert host.dead_ranks() == []
    with pytest.raises(ConnectionError):  # the port is there for the start only
        socket.create_connection((LOCAL, host.port))
    for one in [*crowd, *guests, host]:
        one.close()


def test_a_second_connection_does_not_take_a_ranks_place():
    host = LivenessServer(local=True)
    guests = [LivenessClient(1, addresses=[LOCAL], port=host.port, token=host.token, seconds=2.0)
              for _ in range(2)]
    assert host.accept_ranks({1, 2}, seconds=1.0) == {2}
    guests[1].close()
    assert host.dead_ranks() == []
    guests[0].close()
    host.close()


def test_primary_out_of_reach_is_known():
    guest = LivenessClient(1, addresses=["256.0.0.1"], port=1, token="x", seconds=0.2)
    assert not guest.connected
    assert not guest.primary_lost()


def report():
    worker = WorkerReport(0, 1, updates=7, not_finite=2, delay=Delays(7, 14, 3, [0, 2, 3, 2]))
    gone = WorkerReport(1, 2, left_out="its process ended")
    return Report(7, 2, 2.0, 3.5, 28, 28, 0.1, 0.0, worker.delay, [worker, gone])


def test_log_line_and_terminal(capsys):
    display = Display(enabled=True, total=10)
    assert not display.is_due()
    display.show_report(report())
    display.print_line("async: [worker] 2 is left out")
    display.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("async: 7/10 updates, 3.5 updates/s, delay 2.0 (max 3), 1 workers, "
                        "2 gradients not finite")
    assert lines[1] == "async: [worker] 2 is left out"
    silent = Display(enabled=False, total=None)
    silent.show_report(report())
    assert not silent.is_due()
    assert capsys.readouterr().out == ""


GIVEN_UP = """
import gc, time, types, weakref
import mpi4py
mpi4py.rc.initialize = False
import numpy as np
from hvd_ext.async_ps import registration

class Never:
    def Test(self):
        return False

memory = np.zeros(3)
kept = weakref.ref(memory)
try:
    registration._wait_request(Never(), time.monotonic(), types.SimpleNamespace(start_timeout=7.0), (memory,))
except TimeoutError as error:
    print(error)
del memory
gc.collect()
print("kept", kept() is not None)
"""


def test_memory_of_an_exchange_that_was_given_up_is_kept():
    """MPI may still write into it."""
    done = subprocess.run([sys.executable, "-c", GIVEN_UP], capture_output=True, text=True, timeout=60,
                          check=True)
    assert "not all ranks constructed ParameterServer within 7 s" in done.stdout
    assert "kept True" in done.stdout

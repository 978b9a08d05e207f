"""Waits that are given up, the roll call behind them, and the sum in which ranks compare."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_ext.consistency import checksum
from hvd_ext.consistency.fingerprint import digest_parts
from hvd_ext.watchdog.peer_status import LOCAL, RankStatus, StatusServer, notify_failure, request_status
from hvd_ext.watchdog.token_acceptor import MAX_PENDING_CONNECTIONS
from hvd_ext.watchdog.watchdog import Watchdog, parse_limits, remaining_grace


@pytest.mark.parametrize(("text", "wanted"), [
    ("60", (300.0, 60.0)), ("4,9", (9.0, 4.0)), ("0.5", (2.5, 0.5)),
])
def test_limits(text, wanted):
    assert parse_limits(text) == wanted


@pytest.mark.parametrize("text", ["soon", "0", "-1", "1,0", "1,2,3", "nan,"])
def test_bad_limits_say_what_is_wanted(text):
    with pytest.raises(ValueError, match="HVD_EXT_TIMEOUT must be seconds above 0"):
        parse_limits(text)


@given(st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=40), st.integers(0, 5))
def test_ranks_meet_only_where_all_numbers_are_equal(numbers, left):
    total = sum(checksum.encode_checksum(number) for number in numbers) + np.zeros(checksum.WORDS,
                                                                                   np.int64) * left
    seen = {number % 2 ** (checksum.LIMBS * checksum.LIMB_BITS) for number in numbers}
    assert checksum.all_equal(total) == (len(seen) == 1)


@pytest.mark.parametrize("ranks", [2, 1024, 100_000])
def test_the_sum_of_many_ranks_does_not_overflow(ranks):
    worst = 2**62 - 1
    assert checksum.all_equal(checksum.encode_checksum(worst) * ranks)
    assert not checksum.all_equal(checksum.encode_checksum(worst) * (ranks - 1)
                                  + checksum.encode_checksum(worst - 1))
    assert checksum.all_equal(checksum.encode_checksum(digest_parts("a")) * ranks)


def test_all_ranks_must_be_there_for_what_one_asks():
    asks, asks_not = checksum.encode_checksum(5, asks=True), checksum.encode_checksum(5)
    assert checksum.is_requested(asks + asks_not, 2)
    assert not checksum.is_requested(asks, 2)
    assert not checksum.is_requested(asks_not + asks_not, 2)


def test_a_rank_says_what_it_does():
    listener = StatusServer(local=True)
    listener.record_wait(None)
    answer = request_status(listener.address)
    assert answer.waiting is None
    assert "test_watchdog.py" in str(answer)
    listener.record_wait(("topk/bucket0", 12.3))
    assert "has waited 12 s for topk/bucket0" in str(request_status(listener.address))
    moved = request_status(listener.address).moves
    listener.record_wait(None)
    assert request_status(listener.address).moves > moved
    listener.close()


def test_strangers_learn_and_change_nothing():
    listener = StatusServer(local=True)
    port = listener.address[1]
    assert listener._socket.getsockname()[0] == LOCAL
    silent = socket.create_connection((LOCAL, port))
    for said in (b"x" * 32, b"\x00\xff" * 500, b""):
        with socket.create_connection((LOCAL, port), timeout=10) as stranger:
            stranger.sendall(said)
            heard = b""
            with contextlib.suppress(OSError):  # it may have hung up already
                stranger.shutdown(socket.SHUT_WR)
                heard = stranger.recv(100)
            assert heard == b""
    assert request_status([[LOCAL], port, "f" * 32]) is None
    assert request_status(listener.address) is not None
    silent.close()
    listener.close()


def test_many_silent_strangers_hold_no_rank_up():
    listener = StatusServer(local=True)
    crowd = [socket.create_connection((LOCAL, listener.address[1]), timeout=10) for _ in range(100)]
    for number, stranger in enumerate(crowd):
        if number % 3:
            stranger.sendall(b"x" * (number % 32))  # the beginning of a token, for all that is known
    assert [request_status(listener.address) is not None for _ in range(5)] == [True] * 5
    for stranger in crowd:  # each is shown out without a word
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(100) == b""
        stranger.close()
    crowd = [socket.create_connection((LOCAL, listener.address[1]), timeout=10)
             for _ in range(2 * MAX_PENDING_CONNECTIONS)]
    assert request_status(listener.address) is not None
    for stranger in crowd:
        stranger.close()
    listener.close()


def test_ranks_on_other_hosts_are_asked_by_address():
    listener, other = StatusServer(local=False), StatusServer(local=True)
    hosts, port, token = listener.address
    assert hosts[-1] == socket.gethostname()
    assert all(not host.startswith("127.") for host in hosts[:-1])
    # A name that does not resolve, and somebody else's port under the same address, are passed over.
    assert request_status([["no.such.host.invalid", LOCAL], port, token]).pid == os.getpid()
    assert request_status([[LOCAL, *hosts], other.address[1], token]) is None
    listener.close()
    other.close()


def answer(waiting=None, moves=0):
    return RankStatus("host", 1, waiting, "a.py:1 in f", moves)


@pytest.mark.parametrize(("answers", "moves", "wanted"), [
    ({}, {}, 0.0),
    ({1: None}, {}, 0.0),  # stopped
    ({1: None}, {1: 4}, 10.0),  # it answered not long ago
    ({1: None, 2: answer(moves=5)}, {2: 1}, 0.0),
    ({1: answer(moves=5)}, {1: 4}, 10.0),  # at work
    ({1: answer(moves=5)}, {1: 5}, 0.0),  # it stands still
    ({1: answer(("b", 3.0))}, {1: 5}, 7.0),  # it has just come to another collective
    ({1: answer(("b", 30.0)), 2: answer(("c", 12.0))}, {1: 5, 2: 5}, 0.0),
])
def test_patience(answers, moves, wanted):
    assert remaining_grace(answers, moves, 10.0) == wanted


def test_a_rank_that_is_gone_does_not_answer():
    listener = StatusServer(local=True)
    address = listener.address
    listener.close()
    # The thread may still take one connection.
    assert request_status(address) is None or request_status(address) is None


WAITS = """
import time
from hvd_ext.watchdog.watchdog import WATCH
aborted = []
WATCH.start_watching(0, lambda: aborted.append(1))
WATCH.mark_step_done()
WATCH.start_wait("bucket 7")
end = time.time() + 20
while not aborted and time.time() < end:
    time.sleep(0.05)
WATCH.end_wait()
print("aborted", bool(aborted), WATCH.verdict, flush=True)
"""


@pytest.mark.parametrize("keras", [False, True])
def test_a_wait_is_given_up_and_says_for_what(keras):
    began = time.monotonic()
    program = ("import sys; sys.modules['keras'] = sys" if keras else "") + WAITS
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True,
                          timeout=60, env={"HVD_EXT_TIMEOUT": "1", "PATH": ""}, check=True)
    assert "aborted True rank 0 has waited" in done.stdout
    assert "for bucket 7" in done.stdout
    assert "most recent call first" in done.stderr
    assert ("MetricAverageCallback() before it" in done.stdout) == keras
    assert time.monotonic() - began < 60


def test_a_wait_that_cannot_be_taken_back_ends_the_process():
    program = "import hvd_ext.watchdog.watchdog as w; w.GRACE = 0.5" + WAITS.replace("while not aborted and",
                                                                                     "while")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True,
                          timeout=60, env={"HVD_EXT_TIMEOUT": "1", "PATH": ""}, check=False)
    assert done.returncode == 70
    assert "its collective cannot be taken back" in done.stderr


def test_a_rank_that_fails_tells_the_others(capsys):
    listener, other, ended = StatusServer(local=True), Watchdog(), threading.Event()
    other._abort, other.listener = ended.set, listener
    mine = Watchdog()
    mine.rank, mine.others = 1, {0: listener.address, 1: None}
    assert mine.process_failed(ZeroDivisionError, ZeroDivisionError("a bug"))
    mine.notify_peers("ZeroDivisionError: a bug")
    assert ended.wait(10)
    assert other.verdict.startswith("rank 1 failed: ZeroDivisionError: a bug")
    said = capsys.readouterr().err
    assert "hvd_ext: rank 1 failed: ZeroDivisionError: a bug; its traceback:" in said
    assert "hvd_ext: rank 0 ends because rank 1 failed: ZeroDivisionError: a bug" in said
    assert not other.process_failed(RuntimeError, RuntimeError("of its making"))  # it follows from the first
    listener.close()


def test_nobody_is_told_without_the_token():
    listener, told = StatusServer(local=True), []
    listener.told = lambda rank, what: told.append(rank)
    for token in ("0" * 32, listener.address[2][:-1] + "x"):
        assert not notify_failure([*listener.address[:2], token], 1, "x")
    assert told == []
    assert notify_failure(listener.address, 1, "x" * 10_000)
    assert told == [1]
    listener.close()


def test_a_rank_that_has_left_does_not_answer():
    gone, running = Watchdog(), [True]
    gone.listener = StatusServer(local=True)
    address = gone.listener.address
    gone.start_watching(1, lambda: None, lambda: running[0])
    assert request_status(address) is not None
    running[0] = False
    gone._thread.join(20)
    assert request_status(address) is None
    assert gone.listener is None
    assert gone.others == {}

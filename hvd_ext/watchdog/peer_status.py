"""Ranks that ask each other what they do, beside the collectives that may be stuck.

Each rank listens on a port of its own, on the loopback address where all ranks are on one host, else under
all addresses of its host, which need not have a name that resolves. It answers only who sends the token
that the ranks exchanged. Nobody else can learn or change anything. A rank that fails tells the others so in
the same way.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from hvd_ext.watchdog.addresses import local_addresses
from hvd_ext.watchdog.token_acceptor import TokenAcceptor

LOCAL = "127.0.0.1"
TOKEN = 32  # characters
ASKS, TELLS = b"?", b"!"  # after the token
STATUS_TIMEOUT_S = 2.0
MAX_REASON_CHARS = 2000  # characters of what a rank tells


@dataclass(frozen=True)
class RankStatus:
    """What a rank says of itself.

    Attributes:
        host, pid: where it runs.
        waiting: what it waits for, and for how many seconds; None when it is at work.
        at: where its main thread is.
        moves: how often its main thread was found elsewhere than before, or had computed meanwhile.
    """

    host: str
    pid: int
    waiting: tuple[str, float] | None
    at: str
    moves: int

    def __str__(self) -> str:
        where = f"(pid {self.pid} on {self.host}, at {self.at})"
        if self.waiting is None:
            return f"is not waiting for an exchange {where}"
        what, seconds = self.waiting
        return f"has waited {seconds:.0f} s for {what} {where}"


class StatusServer:
    """This rank's end: a thread that answers.

    Args:
        local: all ranks are on this host.
    """

    def __init__(self, *, local: bool) -> None:
        self.told: Callable[[int, str], None] = lambda rank, what: None
        self._token = secrets.token_hex(TOKEN // 2)
        self._socket = socket.create_server((LOCAL if local else "", 0), backlog=512)
        self._door = TokenAcceptor(self._socket, length=TOKEN + 1, seconds=STATUS_TIMEOUT_S)
        hosts = [LOCAL] if local else local_addresses()
        self.address = [hosts, self._socket.getsockname()[1], self._token]
        self._waiting: tuple[str, float] | None = None
        self._place: object = None
        self._moves = 0
        self._busy, self._sampled = _cpu_seconds(), time.monotonic()
        threading.Thread(target=self._serve_requests, name="hvd_ext roll call", daemon=True).start()

    def record_wait(self, waiting: tuple[str, float] | None) -> None:
        """Note what this rank waits for, and whether its main thread has moved."""
        self._waiting = waiting
        place, busy, now = _main_thread_position(), _cpu_seconds(), time.monotonic()
        computed = busy - self._busy > 0.05 * (now - self._sampled) and not _in_horovod()
        self._moves += computed or place != self._place
        self._place, self._busy, self._sampled = place, busy, now

    def _serve_requests(self) -> None:
        while self._door.open:
            for caller, said in self._door.poll(STATUS_TIMEOUT_S / 4):
                with caller, contextlib.suppress(OSError, ValueError, TypeError):
                    if secrets.compare_digest(said[:TOKEN], self._token.encode()):
                        caller.settimeout(STATUS_TIMEOUT_S / 2)
                        self._handle_request(caller, said[TOKEN:])
        self._door.close()

    def _handle_request(self, caller: socket.socket, wish: bytes) -> None:
        """Answer a rank, and take note of what it tells."""
        if wish == TELLS:
            rank, what = json.loads(_all_of(caller))
            self.told(int(rank), str(what)[:MAX_REASON_CHARS])
        caller.sendall(json.dumps(self._own_status()).encode())

    def _own_status(self) -> dict[str, Any]:
        return {"host": socket.gethostname(), "pid": os.getpid(), "waiting": self._waiting,
                "at": _main_thread_line(), "moves": self._moves}

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def request_status(address: Any) -> RankStatus | None:
    """The status of the rank at ``address``; None without an answer within ``STATUS_TIMEOUT_S``."""
    return _call_rank(address, ASKS)


def notify_failure(address: Any, rank: int, what: str) -> bool:
    """Tell the rank at ``address`` that ``rank`` has failed, and why; whether it has heard."""
    return _call_rank(address, TELLS + json.dumps([rank, what[:MAX_REASON_CHARS]]).encode()) is not None


def _call_rank(address: Any, message: bytes) -> RankStatus | None:
    """The answer of the rank under one of its addresses, which are tried in turn.

    Another host's rank may listen under the same one (a bridge of containers has the same everywhere):
    it does not know the token.
    """
    hosts, port, token = address
    end = time.monotonic() + STATUS_TIMEOUT_S
    for number, host in enumerate(hosts):
        left = (end - time.monotonic()) / (len(hosts) - number)
        answer = _call_one(host, port, token.encode() + message, max(0.1, left))
        if answer is not None:
            return answer
    return None


def _call_one(host: str, port: int, message: bytes, seconds: float) -> RankStatus | None:
    try:
        with socket.create_connection((host, port), timeout=seconds) as connection:
            connection.sendall(message)
            connection.shutdown(socket.SHUT_WR)
            said = _all_of(connection)
        found = json.loads(said)
        waiting = found["waiting"]
        return RankStatus(found["host"], found["pid"], None if waiting is None else tuple(waiting),
                          found["at"], found["moves"])
    except (OSError, ValueError, KeyError):
        return None


def _all_of(connection: socket.socket) -> bytes:
    said = b""
    while len(said) < 8 * MAX_REASON_CHARS and (part := connection.recv(4096)):
        said += part
    return said


def _main_frame() -> FrameType | None:
    main = threading.main_thread().ident
    return None if main is None else sys._current_frames().get(main)


def _cpu_seconds() -> float:
    """What the main thread has computed so far, in seconds; 0 where the system does not say."""
    main = threading.main_thread().ident
    if main is None or not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(main))
    except OSError:
        return 0.0


def _in_horovod() -> bool:
    """Whether the main thread waits in a collective of the user's, which takes CPU time too."""
    frame = _main_frame()
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("horovod.")


def _main_thread_position() -> object:
    """Where the main thread is: the code and the instruction of each of its frames."""
    frame, found = _main_frame(), []
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


def _main_thread_line() -> str:
    """The innermost line of the main thread that is not a library's, or else its innermost one."""
    frame = first = _main_frame()
    while frame is not None and ("site-packages" in frame.f_code.co_filename
                                 or "hvd_ext" in str(frame.f_globals.get("__name__"))):
        frame = frame.f_back
    frame = frame or first
    if frame is None:
        return "its end"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"

"""A stranger on the network: pickles that leave a mark, raw requests, and the servers they go to."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VICTIMS = Path(__file__).with_name("victims.py")
HOST = "127.0.0.1"
DEADLINE_S = 60.0


class Mark:
    """What creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


class Victim:
    """A server of :mod:`tests.security.victims` in a process of its own.

    Args:
        source: folder of the Horovod that it runs.
        name: which server.
        variables: further environment variables.
    """

    def __init__(self, source: Path, name: str, **variables: str) -> None:
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(VICTIMS), name], env={**os.environ, "PYTHONPATH": str(source), **variables},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        started = self._read()
        self.port: int = started["port"]
        self.key = bytes.fromhex(started["key"] or "")

    def ask(self, line: str = "") -> Any:
        """What the server says about itself, or does."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._read()

    def log(self) -> str:
        """What it has written to its standard error."""
        self.errors.seek(0)
        return self.errors.read()

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log()
        return json.loads(line)


@contextlib.contextmanager
def victim(source: Path, name: str, **variables: str) -> Iterator[Victim]:
    """A server for the length of a ``with`` block."""
    server = Victim(source, name, **variables)
    try:
        yield server
    finally:
        server.close()


def connect(port: int) -> socket.socket:
    """A connection to a port of this machine."""
    return socket.create_connection((HOST, port), timeout=DEADLINE_S)


def send(port: int, data: bytes) -> bytes:
    """Send ``data`` and return all that comes back until the connection ends."""
    with connect(port) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


def flood(port: int, count: int) -> list[socket.socket]:
    """So many connections that say nothing, of which the last 500 are returned; the others are closed."""
    silent: list[socket.socket] = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            silent.append(connect(port))
        if len(silent) > 500:
            silent.pop(0).close()
    return silent


def read_all(connection: socket.socket) -> bytes:
    """What comes until the peer ends the connection, in good order or not."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    return received


def http(port: int, method: str, path: str, body: bytes = b"", headers: str = "") -> tuple[int, bytes]:
    """Status and body of a request that nobody signed unless ``headers`` do."""
    request = f"{method} {path} HTTP/1.1\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body
    head, _, answer = send(port, request).partition(b"\r\n\r\n")
    return int(head.split()[1]), answer


def evil_pickle(mark: Path) -> bytes:
    """Bytes that create the file ``mark`` when they are unpickled."""
    return pickle.dumps(Mark(mark))


def evil_base64(mark: Path) -> bytes:
    """The same as Horovod's stores hold it."""
    return base64.b64encode(evil_pickle(mark))


def released_message(key: bytes, body: bytes) -> bytes:
    """A message as services of the release read it."""
    return hmac.new(key, body, hashlib.sha256).digest() + struct.pack("i", len(body)) + body


def edited_message(key: bytes, nonces: bytes, body: bytes) -> bytes:
    """A message as edited services read it, under any key and nonces."""
    length = struct.pack("!Q", len(body))
    parts = [hmac.new(key, nonces + b"request " + part, hashlib.sha256).digest()
             for part in (b"length " + length, b"body " + body)]
    return length + b"".join(parts) + body


def talk_to_edited_service(port: int, key: bytes, body: bytes) -> bytes:
    """Send a pickle to an edited service under ``key``; what comes back after its greeting."""
    with connect(port) as connection:
        nonces = connection.recv(16, socket.MSG_WAITALL) + bytes(16)
        connection.sendall(bytes(16) + edited_message(key, nonces, body))
        return read_all(connection)
